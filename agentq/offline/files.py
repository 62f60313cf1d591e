"""Uploaded files and the files that batches leave, in memory until they are deleted or the server stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from agentq.offline.wire import Refusal

MAX_FILE_BYTES = 100 * 1024 * 1024
MAX_TOTAL_BYTES = 1024 * 1024 * 1024  # of all files, for uploads: what a batch has answered is kept in any case

Purpose = Literal["batch", "batch_output"]


@dataclass(frozen=True, slots=True)
class File:
    """``created_at`` in unix seconds."""

    id: str
    filename: str
    purpose: Purpose
    created_at: int
    content: bytes

    def as_openai(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
            "expires_at": None,
        }


class Files:
    """The files there are, by id."""

    def __init__(self) -> None:
        self._files: dict[str, File] = {}

    def upload(self, filename: str, content: bytes, now: float) -> File:
        """Keep an input file of a batch. Raises ``Refusal`` for a name that is no .jsonl, and where room is lacking."""
        if not filename.endswith(".jsonl"):
            raise Refusal(400, "Invalid file format for Batch API. Must be .jsonl", param="file")
        if sum(len(file.content) for file in self._files.values()) + len(content) > MAX_TOTAL_BYTES:
            raise Refusal(413, f"All files may have at most {MAX_TOTAL_BYTES} bytes. Delete some.", param="file")
        return self.keep(filename, "batch", content, now)

    def keep(self, filename: str, purpose: Purpose, content: bytes, now: float) -> File:
        file = File(f"file-{uuid4().hex}", filename, purpose, int(now), content)
        self._files[file.id] = file
        return file

    def find(self, file_id: str, param: str = "id") -> File:
        """Raises ``Refusal`` (404) where there is none."""
        if file_id not in self._files:
            raise Refusal(404, f"No such File object: {file_id[:80]}", param=param)
        return self._files[file_id]

    def remove(self, file_id: str) -> None:
        """Whoever reads the file at the moment goes on reading. Raises ``Refusal`` (404) where there is none."""
        self.find(file_id)
        del self._files[file_id]
