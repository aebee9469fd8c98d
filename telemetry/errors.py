"""What is wrong with a store, for those who must not load Arrow to say so."""

from __future__ import annotations


class StoreDamaged(RuntimeError):
    """A file of the preference store is missing or damaged: restore it, or move the table away and record it anew."""

    def __init__(self, table: str, error: BaseException) -> None:
        first = str(error).strip().partition("\n")[0]
        super().__init__(f"{table}: {first}. {(self.__doc__ or '').strip()} What the log still holds is not lost.")
