"""Pictures of requests: as data URI, as the id of an upload, or, where it is allowed, from another machine."""

from __future__ import annotations

import base64

from PIL import Image

from distilvlm.data.geometry import PictureError, decode_bytes

from .errors import ApiError
from .fetch import Fetcher
from .protocol import FilePart, ImagePart
from .settings import Settings
from .uploads import Uploads

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""What browsers and phones make. Pillow knows dozens more, some of which run other programs."""

SCANS = 100
"""Of a JPEG: a few bytes are a scan, and each is a pass over all pixels. Progressive ones have about 10."""


class Pictures:
    """Parts of messages as pictures, within the limits of the settings. Methods block: call them from a thread."""

    def __init__(self, settings: Settings, uploads: Uploads) -> None:
        self.settings, self.uploads = settings, uploads
        self._fetcher = Fetcher(settings.hosts, settings.largest, settings.fetching)

    def of(self, part: ImagePart | FilePart, param: str) -> Image.Image:
        """The picture of one part of a message, upright, as RGB.

        Args:
            param: where the part stands, for errors.

        Raises:
            ApiError: it can't be had, or is no picture, or a larger one than is taken.
        """
        if isinstance(part, FilePart):
            return self.decode(self.uploads.get(part.file.file_id).data, f"{param}.file")
        url, param = part.image_url.url, f"{param}.image_url"
        try:
            data = _of_data_uri(url) if url[:5].lower() == "data:" else self._fetcher.fetch(url)
        except ValueError as error:  # of fetching, or of base64
            raise ApiError(400, f"{param}: {error}", param) from None
        return self.decode(data, param)

    def decode(self, data: bytes, param: str) -> Image.Image:
        """Raises `ApiError`: as `of`."""
        if data.count(b"\xff\xda") > SCANS and data.startswith(
            b"\xff\xd8"
        ):  # in what is compressed, 0 follows each 255
            raise ApiError(400, f"{param}: a JPEG of more than {SCANS} scans", param)
        try:
            return decode_bytes(data, FORMATS, self.settings.pixels)
        except PictureError as error:
            raise ApiError(400, f"{param}: {error}", param) from None


def _of_data_uri(url: str) -> bytes:
    head, comma, body = url.partition(",")
    kind, *options = head[5:].lower().split(";")
    if not comma or not kind.startswith("image/") or options[-1:] != ["base64"]:
        raise ValueError("a data URI of a picture begins with data:image/png;base64, (or another type)")
    return base64.b64decode(body, validate=True)
