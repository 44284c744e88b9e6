# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is asked of a lab's Director: jobs, restores, estimates, and what became of them, as its catalogue says."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.bacula.daemons import Daemons, LabError
from tests.limits import HANG_S

#: In 15.0.3 the Director may answer before its queue of jobs is there.
_NOT_YET: Final = "not initialized"
_NOT_YET_S: Final = 20
_QUEUED = re.compile(r"Job queued\. JobId=([0-9]+)")
#: Number of *Plugin Options* in the menu of ``mod``.
_PLUGIN_OPTIONS: Final = "13"
#: What a restore can be told in plugin options, in the order of its menu (``bacula_adapter/restore/options.py``).
Options = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job that has ended. ``status``: T, E, f, A (shared/reference/bacula.md, section 3). ``errors``: counted by Bacula."""

    id: int
    name: str
    level: str
    status: str
    files: int
    size: int
    errors: int
    log: str = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether Bacula calls it good, without any reservation."""
        return self.status == "T" and self.errors == 0


class Director:
    """Commands to the Director of a lab that runs."""

    def __init__(self, daemons: Daemons) -> None:
        self.daemons = daemons

    def reload(self) -> None:
        """Take changed resources. Raises LabError with what is wrong with them."""
        said = self.daemons.console("reload")
        if "rror" in said:
            raise LabError(said[-2000:])

    def start(self, job: str, level: str = "Full", *words: str) -> int:
        """Start a backup; its number."""
        return self.queue(f"run job={job} level={level} {' '.join(words)} yes")

    def wait(self, job: int) -> Job:
        """Wait for the end of a job."""
        return self.wait_all(job)[0]

    def run(self, job: str, level: str = "Full", *words: str) -> Job:
        """A backup from its start to its end."""
        return self.wait(self.start(job, level, *words))

    def run_all(self, *jobs: str, level: str = "Full") -> dict[str, Job]:
        """Several jobs at once, by name: a job alone is mostly the Director's pauses."""
        numbers = {job: self.start(job, level) for job in jobs}
        self.wait_all(*numbers.values())
        return {job: self.job(number) for job, number in numbers.items()}

    def wait_all(self, *jobs: int) -> list[Job]:
        """Wait for the end of several jobs."""
        limit = time.monotonic() + HANG_S
        waiting = list(jobs)
        # A job that has only just been queued may not be waited for yet: then the console does not wait.
        while waiting:
            self.daemons.console(*(f"wait jobid={job}" for job in waiting), limit_s=HANG_S)
            waiting = [job for job in waiting if self._under_way(job)]
            if waiting and time.monotonic() > limit:
                raise LabError(f"jobs {waiting} do not end")
        return [self.job(job) for job in jobs]

    def _under_way(self, job: int) -> bool:
        rows = self.daemons.query("select JobStatus from Job where JobId = ?", job)
        return not rows or rows[0][0] in {"C", "R"}

    def start_restore(
        self,
        jobs: Sequence[int] | str,
        *,
        where: str | None = "/",
        job: str = "restore",
        files: Sequence[str] = (),
        options: Options | None = None,
        plugin: str = "",
        words: str = "",
    ) -> int:
        """Start a restore; its number.

        ``jobs``: exactly these, or words that choose them (``current``). ``where`` None: as the job says.
        ``files``: only these, each a path in the tree. ``options``: plugin options, by the number in their menu; ``plugin``:
        that of the plugin string, if there are several.
        """
        chosen = jobs if isinstance(jobs, str) else f"jobid={','.join(map(str, jobs))}"
        place = "" if where is None else f"where={where}"
        line = f"restore {chosen} restorejob={job} {place} {words}"
        # `select` would mean "current", whatever jobs are named.
        lines = [f"{line} {'' if files else 'all done'} {'' if options else 'yes'}"]
        if files:
            for path in files:
                folder, _, name = path.rpartition("/")
                lines += [f"cd /{folder}", f"mark {name}"]
            lines += ["done"]
            lines += [] if options else ["yes"]
        if options:
            lines += ["mod", _PLUGIN_OPTIONS, *([plugin] if plugin else [])]
            for number, value in options.items():
                lines += ["mod", number, value]
            lines += ["yes", "yes"]
        return self.queue(*lines)

    def restore(
        self,
        jobs: Sequence[int] | str,
        *,
        where: str | None = "/",
        job: str = "restore",
        files: Sequence[str] = (),
        options: Options | None = None,
        plugin: str = "",
        words: str = "",
    ) -> Job:
        """As ``start_restore``, to its end."""
        number = self.start_restore(
            jobs, where=where, job=job, files=files, options=options, plugin=plugin, words=words
        )
        return self.wait(number)

    def cancel(self, job: int) -> None:
        """Cancel a job; it may still run when this returns."""
        self.daemons.console(f"cancel jobid={job} yes")

    def estimate(self, job: str, *words: str) -> str:
        """What ``estimate`` prints."""
        return self.daemons.console(f"estimate job={job} {' '.join(words)}", limit_s=HANG_S)

    def job(self, number: int) -> Job:
        """A job, as the catalogue has it. Raises LabError if it has not ended."""
        rows = self.daemons.query(
            "select Job, Level, JobStatus, JobFiles, JobBytes, JobErrors from Job where JobId = ?",
            number,
        )
        if not rows or rows[0][2] in {"C", "R"}:
            raise LabError(f"job {number} is {rows[0][2] if rows else 'not in the catalogue'}")
        name, level, status, files, size, errors = rows[0]
        log = self.daemons.query("select LogText from Log where JobId = ? order by LogId", number)
        return Job(
            id=number,
            name=name,
            level=level,
            status=status,
            files=files,
            size=size,
            errors=errors,
            log="".join(text for (text,) in log),
        )

    def files(self, job: int) -> list[str]:
        """Names of a job's files in the catalogue, in their order."""
        if self.daemons.debian13:
            statement = "select Path.Path || File.Filename from File join Path using (PathId)"
        else:
            statement = (
                "select Path.Path || Filename.Name from File join Path using (PathId)"
                " join Filename using (FilenameId)"
            )
        rows = self.daemons.query(f"{statement} where JobId = ? order by FileIndex", job)
        return [name for (name,) in rows]

    def objects(self, job: int) -> list[tuple[str, int]]:
        """Name and type of a job's restore objects."""
        return self.daemons.query(
            "select ObjectName, ObjectType from RestoreObject where JobId = ? order by ObjectIndex",
            job,
        )

    def purge(self, job: int) -> None:
        """Let the catalogue forget a job: its volumes stay."""
        self.daemons.console(f"delete jobid={job} yes")

    def queue(self, *lines: str) -> int:
        """Give the console lines that queue a job; its number. Raises LabError if none was."""
        limit = time.monotonic() + _NOT_YET_S
        while True:
            said = self.daemons.console(*lines)
            found = _QUEUED.findall(said)
            if found:
                return int(found[-1])
            if _NOT_YET not in said or time.monotonic() > limit:
                raise LabError(f"no job was queued: {said[-3000:]}")
            time.sleep(0.2)


def backends(daemon: int) -> list[int]:
    """Pids of the backends that a File daemon has at this moment."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            with open(f"{entry.path}/stat", encoding="ascii", errors="replace") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == daemon:
            found.append(int(entry.name))
    return found


__all__ = ["Director", "Job", "Options", "backends"]
