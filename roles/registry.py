"""The roles that exist: the built-in ones, the operator's files, and what an embedding program adds."""

from __future__ import annotations

import os
import stat
from importlib import resources
from typing import TYPE_CHECKING, Final

from roles.definition import NAME, Role
from roles.rolefile import MAX_BYTES, parse_role
from vespera_exec.errors import InvalidInput, InvalidRoleFile, RoleNotFound

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILES: Final = 1000

_SUFFIXES: Final = (".yaml", ".yml")
"""Where a role has a file of each, the first counts."""

_Seen = tuple[tuple[str, int, int, int], ...]


class RoleRegistry:
    """Looks roles up by name. The operator's folder is read again when one of its files has changed.

    A repository's own role files are not read. A broken file hides no other: `problems` tells of it,
    and `get` raises its error for the role that it should have defined.
    """

    def __init__(self, operator_dir: Path | None = None) -> None:
        self._operator_dir = operator_dir
        self._builtin = _builtin_roles()
        self._added: dict[str, Role] = {}
        self._files: dict[str, Role] = {}
        self._broken: dict[str, InvalidRoleFile] = {}
        self._twice: list[str] = []
        self._folder_problem: str | None = None
        self._seen: _Seen | None = None

    @classmethod
    def load(cls, operator_dir: Path) -> RoleRegistry:
        """Built-in roles and those of the operator's folder, which need not exist."""
        registry = cls(operator_dir)
        registry._refresh()
        return registry

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each file that defines no role, with the reason."""
        self._refresh()
        told = [self._folder_problem] if self._folder_problem else []
        return (*told, *(str(each) for each in self._broken.values()), *self._twice)

    def get(self, name: str) -> Role:
        """
        Raises:
            RoleNotFound: there is none of this name.
            InvalidRoleFile: there is a file for it, and it is broken.
        """
        self._refresh()
        for roles in (self._added, self._builtin, self._files):
            if name in roles:
                return roles[name]
        if name in self._broken:
            raise self._broken[name]
        raise RoleNotFound(name if NAME.match(name) else ascii(name[:64]))

    def all(self) -> tuple[Role, ...]:
        """Every role, by name."""
        self._refresh()
        merged = self._files | self._builtin | self._added
        return tuple(merged[name] for name in sorted(merged))

    def names(self) -> tuple[str, ...]:
        return tuple(role.name for role in self.all())

    def add(self, role: Role) -> None:
        """Add a role of the embedding program.

        Raises:
            InvalidInput: the name is taken, or a child process could not import the callable.
        """
        if role.name in self.names() or role.name in self._broken:
            raise InvalidInput(f"a role named {role.name!r} exists already")
        if role.runner == "python" and role.target is None and not role.in_loop:
            raise InvalidInput(
                f"the callable of role {role.name!r} cannot be imported by a child process",
                hint="define it at the top of a module, or make it async and pass in_loop=True",
            )
        self._added[role.name] = role

    def _refresh(self) -> None:
        if self._operator_dir is None:
            return
        try:
            seen = _listing(self._operator_dir)
            self._folder_problem = None
        except FileNotFoundError:
            seen = ()
        except (OSError, InvalidRoleFile) as error:
            seen, self._folder_problem = (), str(error)
        if seen == self._seen:
            return
        self._files, self._broken, self._twice = {}, {}, []
        for name, *_ in seen:
            self._read(self._operator_dir / name)
        self._seen = seen

    def _read(self, path: Path) -> None:
        stem = path.stem
        if stem in self._builtin:
            taken = f"{path.name}:1: the role {stem!r} is built in; give yours another name"
            self._broken[stem] = InvalidRoleFile(taken)
            return
        if stem in self._files or stem in self._broken:
            taken = f"{path.name}:1: the role {stem!r} has a file already, {stem}{_SUFFIXES[0]}; remove one of them"
            self._twice.append(taken)
            return
        try:
            self._files[stem] = parse_role(_read_own(path), file=path.name)
        except InvalidRoleFile as error:
            self._broken[stem] = error


def _builtin_roles() -> dict[str, Role]:
    folder = resources.files("roles.builtin")
    files = sorted((each for each in folder.iterdir() if each.name.endswith(".yaml")), key=lambda each: each.name)
    roles = (parse_role(each.read_bytes(), file=each.name, builtin=True) for each in files)
    return {role.name: role for role in roles}


def _listing(folder: Path) -> _Seen:
    """Name, change stamp, size and mode of each role file; what a change of any shows."""
    if folder.stat().st_mode & stat.S_IWOTH:
        raise InvalidRoleFile(f"{folder}: everybody may write in this folder, its roles are not read; chmod o-w")
    seen: list[tuple[str, int, int, int]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(_SUFFIXES) or entry.name.startswith("."):
                continue
            try:
                info = entry.stat()
            except OSError:  # a link to nothing; reading it says so
                info = entry.stat(follow_symlinks=False)
            seen.append((entry.name, max(info.st_mtime_ns, info.st_ctime_ns), info.st_size, info.st_mode))
    if len(seen) > MAX_FILES:
        raise InvalidRoleFile(f"{folder}: {len(seen)} role files; at most {MAX_FILES} are read")
    return tuple(sorted(seen))


def _read_own(path: Path) -> bytes:
    """The bytes of a regular file inside its folder that only its owner may write."""
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(path.parent.resolve()):
            raise InvalidRoleFile(f"{path.name}:1: a link that leaves the folder of role files")
        # Without O_NONBLOCK a FIFO in the folder would hold us here.
        if not real.is_file():
            raise InvalidRoleFile(f"{path.name}:1: not a regular file")
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, RuntimeError) as error:
        raise InvalidRoleFile(f"{path.name}:1: cannot be read: {error}") from None
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise InvalidRoleFile(f"{path.name}:1: not a regular file")
        if info.st_mode & stat.S_IWOTH:
            raise InvalidRoleFile(f"{path.name}:1: everybody may write this file; chmod o-w it")
        if info.st_uid not in (os.getuid(), 0):
            raise InvalidRoleFile(f"{path.name}:1: it belongs to another user (uid {info.st_uid})")
        return file.read(MAX_BYTES + 1)
