"""Images of requests: data URLs, and, from hosts that were allowed by name, addresses. Never a file of this machine."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx
from PIL import Image

from adallava.errors import ImageError
from adallava.hosts.images import load_image

_DATA = re.compile(r"data:image/[a-zA-Z0-9.+-]+;base64,", re.ASCII)
_REDIRECTS = 3
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is read: other formats of Pillow start programs (EPS) or decode before their size is known (ICO)."""


@dataclass(frozen=True)
class ImagePolicy:
    """What a server takes as an image."""

    hosts: tuple[str, ...] = ()
    """Names of hosts from which images are fetched; none by default."""
    max_bytes: int = 20 * 2**20
    max_pixels: int = 20_000_000
    """Of all images of a request."""
    max_images: int = 16
    timeout_s: float = 10.0
    """For a fetched image, from the first byte asked for to the last one that came."""


def read_image(url: str, policy: ImagePolicy) -> Image.Image:
    """The image behind the ``url`` of a message; ``ImageError`` says what is wrong with it."""
    if url.startswith("data:"):
        return load_image(_decoded(url, policy), policy.max_pixels, FORMATS)
    parts = _split(url)
    if parts is None or parts.scheme not in ("http", "https"):
        raise ImageError(f"the image is {url[:80]!r}; expected a data URL: data:image/png;base64,...")
    return load_image(_fetched(url, policy), policy.max_pixels, FORMATS)


def _decoded(url: str, policy: ImagePolicy) -> bytes:
    head = _DATA.match(url)
    if head is None:
        raise ImageError(f"the data URL begins with {url[:40]!r}; expected data:image/png;base64,...")
    if len(url) > policy.max_bytes * 4 // 3 + head.end() + 4:
        raise ImageError(f"the image has more than the {policy.max_bytes:,} bytes allowed. Scale it down first.")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data URL is not base64 ({error}).") from error


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # a number out of range is found only when it is looked at
    except ValueError:
        return None
    return parts


def _fetched(url: str, policy: ImagePolicy) -> bytes:
    """The bytes at an address. Each redirect is checked like the address itself."""
    for _ in range(_REDIRECTS + 1):
        parts = _split(url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ImageError(f"the image leads to {url[:80]!r}, which is no web address.")
        if parts.hostname not in {host.lower() for host in policy.hosts}:
            raise ImageError(
                f"images are not fetched from {parts.hostname!r}. Send the image as a data URL, or have the host "
                "allowed: --allow-image-urls."
            )
        found = _get(parts, policy)
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(url, found)
        except ValueError as error:
            raise ImageError(f"the image was redirected to {found[:80]!r}, which is no web address.") from error
    raise ImageError(f"the image was redirected more than {_REDIRECTS} times.")


def _get(parts: SplitResult, policy: ImagePolicy) -> bytes | str:
    """What is there, or where it is said to be.

    The address is looked up once, checked, and asked by number: a second look could find another one.
    """
    host = str(parts.hostname)
    number = _public_address(host, parts.port or (443 if parts.scheme == "https" else 80))
    place = f"[{number}]" if ":" in number else number
    target = parts._replace(netloc=place if parts.port is None else f"{place}:{parts.port}").geturl()
    headers = {"Host": parts.netloc.rpartition("@")[2], "Accept": "image/*"}
    try:
        with (
            httpx.Client(timeout=policy.timeout_s, trust_env=False) as client,
            client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as answer,
        ):
            if answer.is_redirect:
                return answer.headers.get("location", "")
            if answer.status_code != 200:
                raise ImageError(f"{host} answered {answer.status_code} for the image.")
            return _limited(answer, policy, host)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"the image could not be fetched from {host}: {type(error).__name__}.") from error


def _limited(answer: httpx.Response, policy: ImagePolicy, host: str) -> bytes:
    data, until = bytearray(), time.monotonic() + policy.timeout_s
    for piece in answer.iter_bytes():
        data += piece
        if len(data) > policy.max_bytes:
            raise ImageError(f"the image at {host} has more than the {policy.max_bytes:,} bytes allowed.")
        if time.monotonic() > until:
            raise ImageError(f"the image at {host} took more than {policy.timeout_s:g} s.")
    return bytes(data)


def _public_address(host: str, port: int) -> str:
    """The first address of a host; ``ImageError`` if any of them is not public."""
    try:
        found: Sequence[str] = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise ImageError(f"there is no host {host!r}.") from error
    for address in found:
        if not ipaddress.ip_address(address.partition("%")[0]).is_global:
            raise ImageError(f"{host} has the address {address}, which is not public. It is not asked.")
    return found[0]
