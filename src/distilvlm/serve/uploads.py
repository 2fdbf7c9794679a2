"""Pictures that were uploaded, as they came, in memory for a while."""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass

from .errors import ApiError
from .protocol import Purpose


@dataclass(frozen=True)
class Upload:
    id: str
    name: str  # as the client calls it; never opened
    purpose: Purpose
    created: float
    expires: float
    data: bytes


class Uploads:
    """Who knows an upload's id may use it; ids can't be guessed, and are not listed.

    Args:
        largest: bytes of all that are kept.
        seconds: that each is kept.
    """

    def __init__(self, largest: int, seconds: float) -> None:
        self.largest, self.seconds = largest, seconds
        self._kept: dict[str, Upload] = {}  # the oldest first
        self._lock = threading.Lock()

    def add(self, data: bytes, name: str, purpose: Purpose) -> Upload:
        """Keep a picture. Raises `ApiError` where there is no room."""
        with self._lock:
            now = self._expire()
            if sum(len(one.data) for one in self._kept.values()) + len(data) > self.largest:
                if not self._kept:
                    raise ApiError(413, f"more than the {self.largest:,} bytes of all uploads: see --uploads")
                oldest = next(iter(self._kept.values()))
                raise ApiError(429, "there is no room for uploads", code="busy", retry_after=oldest.expires - now)
            upload = Upload(f"file-{secrets.token_hex(16)}", name, purpose, now, now + self.seconds, data)
            self._kept[upload.id] = upload
            return upload

    def get(self, id: str) -> Upload:
        """Raises `ApiError` where there is none, or no more."""
        with self._lock:
            self._expire()
            if id not in self._kept:
                raise ApiError(404, "there is no such file, or it was kept long enough: upload it again", "file_id")
            return self._kept[id]

    def remove(self, id: str) -> None:
        """Raises `ApiError` as `get`."""
        self.get(id)
        with self._lock:
            self._kept.pop(id, None)

    def _expire(self) -> float:
        now = time.time()
        self._kept = {id: one for id, one in self._kept.items() if one.expires > now}
        return now
