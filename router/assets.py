"""The files of ``router/pages``, with their types. Read at each request: they are few, small and local."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Final

from starlette.responses import Response

from router.errors import NotFound

PAGES: Final = Path(__file__).parent / "pages"
_TYPES: Final = {".js": "text/javascript", ".webmanifest": "application/manifest+json"}


def page(name: str) -> Response:
    """The file ``name`` as it is now; raises NotFound, also for anything outside the folder."""
    path = PAGES / name
    if Path(name).name != name or name.startswith(".") or not path.is_file():
        raise NotFound("There is no such page.")
    media_type = _TYPES.get(path.suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return Response(path.read_bytes(), media_type=media_type, headers=headers)
