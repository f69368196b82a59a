"""The names in a directory, read again only when they changed."""

import os

from execgate.containers.files import FileKey, is_settled, key_if_there, now, translate
from execgate.model.errors import Internal


class Listing:
    """The entries of one directory, as a set that stays the same object until the directory changes.

    One that changed just before it was read is read again at the next question, until its key is settled.

    One that does not exist has none. Names that begin with a dot are the owner's own (crun's `.cache`); symlinks, and
    names that are no UTF-8, are nobody's.
    """

    def __init__(self, path: str, *, directories: bool = True) -> None:
        """Read nothing yet. `directories` False lists regular files instead."""
        self.path = path
        self._directories = directories
        self._key: FileKey | None = None
        self._settled = False
        self._names: frozenset[str] = frozenset()

    def names(self) -> frozenset[str]:
        """Return the names now. Raises as `translate` does: Internal without permission, Unavailable."""
        key = key_if_there(self.path)
        if key is None:
            self._settled, self._key = False, None
            self._replace(frozenset())
        elif key != self._key or not self._settled:
            # The stamp is taken before the look: what comes in between is seen by the next one.
            self._settled = is_settled(key, now())
            self._replace(self._scan())
            self._key = key
        return self._names

    def _scan(self) -> frozenset[str]:
        try:
            with os.scandir(self.path) as entries:
                return frozenset(
                    entry.name
                    for entry in entries
                    if not entry.name.startswith(".")
                    and _is_text(entry.name)
                    and (
                        entry.is_dir(follow_symlinks=False)
                        if self._directories
                        else entry.is_file(follow_symlinks=False)
                    )
                )
        except FileNotFoundError:
            return frozenset()
        except NotADirectoryError as error:
            raise Internal("a directory of the host cannot be read", hint=f"{self.path}: {error.strerror}") from error
        except OSError as error:
            raise translate(error, self.path) from error

    def _replace(self, names: frozenset[str]) -> None:
        if names != self._names:
            self._names = names


def _is_text(name: str) -> bool:
    """Return whether the name of a file can be encoded; Python shows bytes that are no UTF-8 as lone surrogates."""
    return name.isascii() or not any("\udc80" <= character <= "\udcff" for character in name)
