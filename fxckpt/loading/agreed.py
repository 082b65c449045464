"""All ranks of a job choose one checkpoint, or one step of the journal behind it: the newest that every rank has, and that
verifies on every rank."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from fxckpt.compat.ranks import default_store, launched, rank, world_size
from fxckpt.errors import Corrupt, FxckptError, NoCheckpoint, RanksDisagree, SetupError
from fxckpt.loading.phases import Elsewhere, Phases
from fxckpt.loading.replicated import Kept, Places
from fxckpt.loading.target import Target
from fxckpt.ranks import Agreement, Key, Said, described, key_of, newest_common, none_was_common, safe, stores_digest
from fxckpt.ranks.replication import Replication
from fxckpt.store.about import Job, job, known_as, newest_life
from fxckpt.store.identity import keep_id
from fxckpt.store.journaled import Broken, Journaled, Loadable
from fxckpt.store.reader import Candidate, Reader, directory_of
from fxckpt.store.record import Record

log: logging.Logger = logging.getLogger("fxckpt")

Found = Loadable | Corrupt


@dataclass(frozen=True)
class Chosen:
    """What all ranks have chosen (None: all begin anew), and the life that begins. ``safe``: the steps that are on two disks of
    every rank, oldest first, with their generations in this rank's store (None: it is not in there)."""

    found: Loadable | None
    begins: Job
    safe: Mapping[Key, int | None] = field(default_factory=dict)


def agreement_for(target: Target, asked: bool) -> Agreement | None:
    """How this load is agreed on; None for one process, or for weights that are loaded into no run. ``asked``: the script says
    which checkpoint. Raises SetupError if there are other ranks that cannot be asked, or whose checkpoints will not meet."""
    if target.run is None:
        return None
    target.run.saver.ranks.check_schedule()
    if (found := default_store()) is not None:
        return Agreement(found[0], rank(), world_size(), found[1]) if world_size() > 1 else None
    name, size = launched()
    size = max(size, world_size())
    if size > 1 and not asked:
        raise SetupError(
            f"this is one of {size} ranks ({name or 'torch.distributed'} says so), and they cannot agree on a step to start "
            "from: there is no process group with a store. Call torch.distributed.init_process_group() before fxckpt.load(), or "
            "name the step on every rank with load(step=...). If each process is a training of its own, set WORLD_SIZE=1"
        )
    return None


class Choosing:
    """One load of all ranks, which choose together until what they have chosen can be restored on every one of them. What does
    not verify here is added to ``skipped``. ``kept``: what lies on this disk, where there are replicas."""

    def __init__(
        self,
        agreement: Agreement,
        look: Callable[[], Sequence[Found]],
        kept: Sequence[Kept],
        replication: Replication | None,
        target: Target,
        directory: str,
        skipped: list[tuple[str, str]],
        at_stake: bool,
    ):
        def is_mine(record: Record) -> bool:  # disks may have changed places; of a rank that there was not, anyone's is as good
            return replication is None or record.rank == agreement.rank or agreement.rank >= record.world_size

        self._agreement, self._skipped = agreement, skipped
        self._mine, own, error = _look(look, is_mine, target, directory, skipped)
        own["at_stake"] = at_stake
        own["kept"], own["number"] = kept, max([own["number"], *(number for *_, number, _ in kept)])
        self._said: list[Said] = agreement.exchange("has", own)
        if error is not None and not isinstance(error, NoCheckpoint):
            raise error
        # Where nothing is at stake it is verified as it is read; but of several places the first good one must be known.
        self.verifies: bool = replication is not None or any(each["at_stake"] for each in self._said)
        self._places = Places(self._mine, self._said, agreement.rank, replication)
        self._banned = set[Key]()
        self._bad = set[Key]()  # steps of the journal that cannot be made, for what one of them did not verify of
        self._restored = 0  # how often they tried

    def newest(self) -> Chosen:
        """What all ranks begin with. Raises RanksDisagree if there is no common one, with what each rank has."""
        said, banned = self._said, self._banned
        stores, number = stores_digest([each["store"] for each in said]), 1 + max(each["number"] for each in said)
        begins = Job(said[0]["life"], stores, number=number)
        if not any(each["keys"] or each["kept"] or each["damaged"] or each["error"] for each in said):
            return Chosen(None, begins)
        while (key := newest_common(said, banned)) is not None:
            self._bad = set[Key]()
            chosen, verdict = self._places.first_good(key, self._verify)
            bad = {key} | self._bad if verdict else set[Key]()
            heard = self._agreement.exchange(f"damaged/{len(banned)}", [verdict, sorted(bad)])
            damaged = [(at, why) for at, (why, _) in enumerate(heard) if why]
            if not self._give_up(chosen, damaged, {key_of(each) for _, keys in heard for each in keys}):
                mine = self._mine
                on_two = {each: mine[each].record.generation if each in mine else None for each in safe(said, key)}
                return Chosen(chosen, begins, on_two)
        if not banned and none_was_common(said):
            log.warning("fxckpt: all ranks start from the beginning: an earlier life of this job ended before every rank had "
                        "committed its first checkpoint. What some have is given up:%s", described(said))  # fmt: skip
            return Chosen(None, begins)
        raise RanksDisagree(
            "the ranks have no checkpoint of one step, written in one life of the job, that verifies on all of them:"
            f"{described(said)}\n{len(banned)} common one(s) did not verify. To start over give all of them up with "
            "compile_step(..., fresh=True), on every rank; a larger keep= makes this less likely."
        )

    def _give_up(self, found: Loadable | None, damaged: Sequence[tuple[int, str]], keys: Set[Key]) -> bool:
        """No rank loads these any more, and why is said; False if it is none. ``found``: what this rank would have loaded where
        others, ``damaged``, say why they cannot."""
        for at, why in damaged:
            mine = at == self._agreement.rank
            reason = why if mine else f"rank {at}: {why}"
            log.error("fxckpt: %s; looking for an older step", reason)
            if found is not None and not mine:
                self._skipped.append((str(found.path), reason))
        self._banned |= keys
        return bool(keys)

    def _verify(self, found: Loadable) -> str:
        """What is wrong with it here; empty if nothing is. Of a step of the journal all is read that it is made from."""
        if not self.verifies:
            return ""
        row = [found] if isinstance(found, Candidate) else [found.base, *found.records]
        for number, each in enumerate(row):
            if why := self._verify_one(each.path):
                self._bad |= self._behind(found, number)
                return why
        return ""

    def _verify_one(self, path: Path) -> str:
        """One directory. Of one that several ranks wrote together each looks at some parts."""
        try:
            reader = Reader(path)
            parts = range(self._agreement.rank, len(reader.record.ranks), self._agreement.world)
            for part in parts if reader.record.ranks else (None,):
                reader.verify(part=part)
        except (Corrupt, NoCheckpoint) as error:
            self._skipped.append((str(path), str(error)))
            return str(error)
        return ""

    def _behind(self, found: Loadable, number: int) -> set[Key]:
        """What is made from the directory of this number in a row; 0 is its checkpoint."""
        if isinstance(found, Candidate):
            return set()
        rows = {key: each for key, each in self._mine.items() if isinstance(each, Journaled) and each.base is found.base}
        return {key for key, each in rows.items() if len(each.records) >= number}

    def restored(self, found: Loadable | None, restore: Callable[[Phases], None]) -> bool:
        """Restore here, and hear how it goes elsewhere: no rank trains on while another one could not load. False if it proved
        damaged somewhere: they choose anew."""
        self._restored += 1
        phases, own = Phases(self._agreement, self._restored), None
        try:
            restore(phases)
            phases.all()
        except Elsewhere:
            pass
        except (Broken, Corrupt, NoCheckpoint) as error:
            assert found is not None
            why = error.error if isinstance(error, Broken) else error
            at = directory_of(why) if isinstance(why, Corrupt) and isinstance(found, Journaled) else str(found.path)
            self._skipped.append((at, str(error)))
            phases.give_up(str(error), self._damaged(found, error))
        except Exception as error:
            own = error
            phases.give_up(f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        if phases.failed:
            wrong = "".join(f"\n  rank {at}: {why}" for at, why in phases.failed)
            raise RanksDisagree(f"other ranks could not load, so this one does not train on:{wrong}")
        return not self._give_up(found, phases.damaged, phases.broken)

    def _damaged(self, found: Loadable, error: Exception) -> set[Key]:
        """What cannot be loaded any more, by what restoring this one raised."""
        if isinstance(error, Broken):
            return self._behind(found, error.good + 1)
        base = found if isinstance(found, Candidate) else found.base
        return {known_as(base.record), known_as(found.record)} | self._behind(found, 0)


def _look(
    look: Callable[[], Sequence[Found]],
    is_mine: Callable[[Record], bool],
    target: Target,
    directory: str,
    skipped: list[tuple[str, str]],
) -> tuple[dict[Key, Loadable], Said, FxckptError | None]:
    """What this rank has, what it says of it, and the error that the others are told of before it is raised."""
    mine: dict[Key, Loadable] = {}
    damaged, failed, run = 0, None, target.run
    elsewhere = run is None or os.path.realpath(directory) != os.path.realpath(run.directory)
    try:
        for each in look():
            if isinstance(each, Corrupt):
                damaged += 1
                skipped.append((directory_of(each), str(each)))
            elif is_mine(each.record):
                mine.setdefault(known_as(each.record), each)
    except FxckptError as error:
        failed = error
    beside = sorted({job(each.record).stores for each in mine.values()})
    store = None if run is None else keep_id(run.directory)
    common = any(job(each.record).common is not None for each in mine.values())
    said: Said = {
        "keys": list(mine), "kept": [], "damaged": damaged, "directory": directory, "elsewhere": elsewhere,
        "at_stake": False, "store": store or "", "beside": beside, "common": common, "life": uuid.uuid4().hex,
        "number": newest_life(each.record for each in mine.values()), "error": "" if failed is None else str(failed),
    }  # fmt: skip
    return mine, said, failed
