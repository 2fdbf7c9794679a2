"""`/v1/files`: pictures that are uploaded once and named by their id afterwards."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, UploadFile

from .desk import Desk
from .protocol import FileBody, FileDeleted, Purpose
from .uploads import Upload


def routes(desk: Desk) -> APIRouter:
    """The routes of uploads. There is none that lists them: who knows an id may use it."""
    router = APIRouter(prefix="/v1/files", tags=["files"])

    @router.post("")
    async def upload(file: UploadFile, purpose: Annotated[Purpose, Form()]) -> FileBody:
        """Keep a picture for a while; a message names it as `{"type": "file", "file": {"file_id": ID}}`."""
        data = await file.read()
        await desk.prepared(lambda: desk.pictures.decode(data, "file"))  # what is no picture is refused here
        return _body(desk.uploads.add(data, file.filename or "", purpose))

    @router.get("/{file_id}")
    async def told(file_id: str) -> FileBody:
        """What is known of an upload."""
        return _body(desk.uploads.get(file_id))

    @router.delete("/{file_id}")
    async def removed(file_id: str) -> FileDeleted:
        """Forget an upload."""
        desk.uploads.remove(file_id)
        return FileDeleted(id=file_id)

    return router


def _body(upload: Upload) -> FileBody:
    return FileBody(
        id=upload.id,
        bytes=len(upload.data),
        created_at=int(upload.created),
        expires_at=int(upload.expires),
        filename=upload.name,
        purpose=upload.purpose,
    )
