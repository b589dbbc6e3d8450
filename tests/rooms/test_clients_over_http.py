"""Published files read over HTTP by clients that know nothing of us. Stock webdataset is in exchange/."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np
import pytest
from servers import NGINX, nginx

import ferkd_data as fd

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")


@pytest.fixture
def url(label_set, tmp_path):
    (tmp_path / "nginx").mkdir()
    with nginx(label_set, tmp_path / "nginx") as server:
        yield f"{server.url}/plain"


def test_duckdb(url, label_set):
    """Through fsspec's HTTP files: PyPI has DuckDB's own httpfs extension, but not for DuckDB 2."""
    import duckdb
    from fsspec.implementations.http import HTTPFileSystem

    class Files(HTTPFileSystem):
        def modified(self, path):
            """DuckDB asks for it, fsspec does not have it."""
            return datetime(2026, 1, 1, tzinfo=timezone.utc)

    labels = fd.open_labels(label_set)
    with duckdb.connect() as connection:
        connection.register_filesystem(Files(skip_instance_cache=True))
        files = [f"{url}/{shard.files[1].path}" for shard in labels.manifest.shards]
        rows = connection.execute("select key, class_prob[1] from read_parquet(?)", [files]).fetchall()
    assert [key for key, _ in rows] == list(labels.keys())
    assert np.array_equal(np.array([p for _, p in rows]), [image.class_prob[4, 0] for image in labels])


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_datasets(url, label_set, tmp_path):
    import datasets

    labels = fd.open_labels(label_set)
    files = [f"{url}/{shard.files[0].path}" for shard in labels.manifest.shards]
    table = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "hf"))["train"]
    assert table["key"][:] == list(labels.keys())
    rows = list(datasets.load_dataset("parquet", data_files=files, streaming=True)["train"])
    assert [row["class_index"][:4] for row in rows] == [image.class_index[0].tolist() for image in labels]
