"""Label sets on servers: over HTTP, in object stores, on the Hugging Face hub."""

from __future__ import annotations

from ferkd_data.remote.remote import (
    SCHEMES,
    HubLocation,
    Remote,
    hub_address,
    hub_endpoint,
    hub_headers,
    is_remote,
    open_remote,
    parse_hub_url,
    part_of,
)
from ferkd_data.remote.retries import Retries, Transient
from ferkd_data.remote.transport import LOG_IN, Transport

__all__ = [
    "LOG_IN",
    "SCHEMES",
    "HubLocation",
    "Remote",
    "Retries",
    "Transient",
    "Transport",
    "hub_address",
    "hub_endpoint",
    "hub_headers",
    "is_remote",
    "open_remote",
    "parse_hub_url",
    "part_of",
]
