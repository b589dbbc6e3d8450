"""A teacher whose module changes settings of other libraries and the working folder, as some repositories do."""

from __future__ import annotations

import os

import numpy as np
import PIL.Image
import PIL.ImageFile
from ferkd_tiny_teachers import first as first

PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True
PIL.Image.MAX_IMAGE_PIXELS = 3
np.seterr(all="raise")
os.chdir("/")
