"""OpenAI's Files endpoints, for the files of batches."""

from __future__ import annotations

import time

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from agentq.offline import files
from agentq.offline.files import Files
from agentq.offline.respond import HEADERS, as_json, refusals
from agentq.offline.wire import Refusal

_FILES = web.AppKey("files", Files)
_SLICE = 256 * 1024
_MAX_FIELD = 1024


def add_routes(app: web.Application, store: Files) -> None:
    app[_FILES] = store
    app.add_routes(
        [
            web.post("/v1/files", _upload),
            web.get("/v1/files/{id}", _show),
            web.get("/v1/files/{id}/content", _content),
            web.delete("/v1/files/{id}", _delete),
        ]
    )


@refusals("openai")
async def _upload(request: web.Request) -> web.StreamResponse:
    """A form with ``file`` and ``purpose``, in any order; other fields are ignored."""
    filename, content, purpose = "", None, None
    if not request.content_type.startswith("multipart/"):
        raise Refusal(400, f"Send the file as multipart/form-data, not {request.content_type}.")
    try:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                raise Refusal(400, "The form has a form within it.")
            if part.name == "file":
                filename, content = part.filename or "", await _read(part, files.MAX_FILE_BYTES)
            elif part.name == "purpose":
                purpose = (await _read(part, _MAX_FIELD)).decode()
    except (ValueError, RuntimeError, HttpProcessingError) as error:  # what aiohttp raises for a body that is no form
        raise Refusal(400, f"The form could not be read: {error}") from None
    if content is None:
        raise Refusal(400, "Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
    if purpose != "batch":
        raise Refusal(400, "The purpose must be 'batch': this stand-in needs files for nothing else.", param="purpose")
    return as_json(request.app[_FILES].upload(filename, content, time.time()).as_openai())


async def _read(part: BodyPartReader, limit: int) -> bytes:
    """The content of a field. Raises ``Refusal`` where it is longer than ``limit``, which is never exceeded by more
    than a slice."""
    found = bytearray()
    while chunk := await part.read_chunk(_SLICE):
        found += chunk
        if len(found) > limit:
            raise Refusal(413, f"{part.name} may have at most {limit} bytes.", param=part.name)
    return bytes(found)


@refusals("openai")
async def _show(request: web.Request) -> web.StreamResponse:
    return as_json(request.app[_FILES].find(request.match_info["id"]).as_openai())


@refusals("openai")
async def _content(request: web.Request) -> web.StreamResponse:
    """In slices: a large file is no reason for others to wait."""
    content = request.app[_FILES].find(request.match_info["id"]).content
    response = web.StreamResponse(headers={**HEADERS, "Content-Type": "application/octet-stream"})
    response.content_length = len(content)
    await response.prepare(request)
    for start in range(0, len(content), _SLICE):
        await response.write(content[start : start + _SLICE])
    await response.write_eof()
    return response


@refusals("openai")
async def _delete(request: web.Request) -> web.StreamResponse:
    file_id = request.match_info["id"]
    request.app[_FILES].remove(file_id)
    return as_json({"id": file_id, "object": "file", "deleted": True})
