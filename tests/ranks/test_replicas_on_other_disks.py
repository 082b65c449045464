"""Ranks whose disks are lost go on from replicas on other ranks' disks; here each rank's directory plays the disk of a host."""

from __future__ import annotations

import dataclasses
import queue
import random
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from replicated_job import SCRIPT, Life, replicas, started
from storing import fast_directory, start
from waiting import until

from fxckpt.cli import main
from fxckpt.compiled_optimizer import together
from fxckpt.config import Config
from fxckpt.errors import Corrupt, SetupError
from fxckpt.ranks import holders, newest_common, safe
from fxckpt.ranks.choice import available
from fxckpt.ranks.common import Decision, Holder, Promise, aim_next, decide
from fxckpt.ranks.replication import SECRET, Lost, Replication, keeper_of
from fxckpt.ranks.replication.wire import Line, connected
from fxckpt.store.lock import holder
from fxckpt.store.reader import Reader, checkpoints
from fxckpt.store.record import Record
from fxckpt.store.replica_folder import ReplicaFolder


@pytest.fixture(scope="module")
def whole(_fork_server, tmp_path_factory):
    """The script, and the weights of a job that nobody kills."""
    place = tmp_path_factory.mktemp("whole")
    script = place / "job.py"
    script.write_text(SCRIPT)
    return script, Life(_fork_server, script, [place / "a", place / "b"], "0").end()


@pytest.fixture
def killed(fork_server, whole, tmp_path):
    """A job that was killed: its two disks, up to which step both surely have replicas, and what starts it again."""
    disks = [tmp_path / "a", tmp_path / "b"]
    step = Life(fork_server, whole[0], disks).kill_when_replicated(4)
    for rank, disk in enumerate(disks):  # at whatever instant of a transfer they were killed
        assert all(Reader(each).verify() is None for each in replicas(disk / "d", 1 - rank))
    return disks, step, lambda: Life(fork_server, whole[0], disks, "0")


def test_a_rank_whose_whole_disk_is_lost_goes_on_from_its_replica_with_the_same_bits(killed, whole):
    disks, step, again = killed
    shutil.rmtree(disks[1])
    life = again()
    assert life.end() == whole[1], life.output
    (at, _), *_ = found = started(life)
    assert at >= step and found == [(at, 0), (at, 1)], life.output
    assert "no good checkpoint of step" in life.ranks[1].output and "from rank 0" in life.ranks[1].output


def test_so_it_does_where_monitors_write(fork_server, whole, tmp_path):
    disks = [tmp_path / "a", tmp_path / "b"]
    step = Life(fork_server, whole[0], disks, WRITER="monitor").kill_when_replicated(4)
    until(lambda: holder(str(disks[0] / "d")) is None)  # its monitor has finished
    shutil.rmtree(disks[0])
    life = Life(fork_server, whole[0], disks, "0", WRITER="monitor")
    assert life.end() == whole[1], life.output
    (at, _), *_ = found = started(life)
    assert at >= step and found == [(at, 0), (at, 1)], life.output


def test_ranks_that_start_in_each_others_places_get_their_own_state(killed, whole, fork_server):
    disks, step, again = killed
    disks.reverse()
    life = Life(fork_server, whole[0], disks)
    step = life.kill_when_replicated(step + 3)
    (at, _), *_ = found = started(life)
    assert found == [(at, 0), (at, 1)], life.output
    shutil.rmtree(disks[1])
    disks.reverse()  # rank 1 is where rank 0 was, whose newest steps are none of its own
    life = again()
    assert life.end() == whole[1], life.output
    (at, _), *_ = found = started(life)
    assert at >= step and found == [(at, 0), (at, 1)], life.output


def test_a_replica_that_rotted_is_noticed_and_all_load_an_older_common_step(killed, whole):
    disks, _, again = killed
    shutil.rmtree(disks[1])
    newest = replicas(disks[0] / "d", 1)[-1]
    flip(newest / "model.safetensors")
    step = checkpoints(newest.parent)[-1].step
    life = again()
    assert life.end() == whole[1], life.output
    (at, _), *_ = found = started(life)
    assert 0 < at < step and found == [(at, 0), (at, 1)], life.output
    assert f"the replica of step {step}, from rank 0, cannot be loaded" in life.ranks[1].output


# ---- what goes from one disk to another, in this process ----


class Pair:
    """Two ranks, each with a store on a disk and a way to the other one."""

    def __init__(self, base, keep=2):
        self.trainers = [start(base / f"host{rank}", keep=8) for rank in range(2)]
        self.roots = [Path(each.store.root) for each in self.trainers]
        self.ranks = [Replication(str(root), keep, rank, ("127.0.0.1", "127.0.0.2")) for rank, root in enumerate(self.roots)]
        self.told: queue.SimpleQueue = queue.SimpleQueue()

    def begin(self, through=None):
        """``through``: a port that stands in for rank 0's."""
        ports = [through or self.ranks[0].port, self.ranks[1].port]
        for each in self.ranks:
            each.start(b"s" * SECRET, ports)
            each.begins("")
        return self

    def save(self, step):
        """A checkpoint of rank 1."""
        trainer = self.trainers[1]
        return trainer.finish(step, *trainer.begin(step), rank=1, world_size=2)

    def send(self, step, held=()):
        """Rank 1's, to rank 0's disk; whether it is durable there."""
        self.ranks[1].send((step, step, ""), [(each, each, "") for each in held], lambda key, good: self.told.put((key[0], good)))
        return self.told.get(timeout=30) == (step, True)

    def there(self):
        """The steps of rank 1 on rank 0's disk, which all verify."""
        found = checkpoints(self.roots[0] / "replicas" / "rank-00001")
        for each in found:
            Reader(each.path).verify()
        return [each.step for each in found]

    def close(self):
        for each in (*self.ranks, *self.trainers):
            each.close()


@pytest.fixture
def pair(tmp_path):
    with fast_directory(tmp_path) as base:
        found = Pair(base)
        yield found
        found.close()


class Between:
    """Stands between a rank and another one, and does something to each piece of what the first sends."""

    def __init__(self, port, change):
        self._to, self._change = port, change
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            near, _ = self._server.accept()
            far = socket.create_connection(("127.0.0.1", self._to))
            threading.Thread(target=self._pass, args=(far, near, lambda data: data), daemon=True).start()
            threading.Thread(target=self._pass, args=(near, far, self._change), daemon=True).start()

    def _pass(self, source, target, change):
        with suppress(OSError):
            while data := source.recv(4096):
                target.sendall(change(data))
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def test_a_replica_is_a_checkpoint_like_any_other_and_commands_read_it(pair, capsys):
    pair.begin()
    path = pair.save(1)
    assert pair.send(1) and pair.there() == [1]
    (copy,) = replicas(pair.roots[0], 1)
    assert {each.name: each.read_bytes() for each in copy.iterdir()} == {each.name: each.read_bytes() for each in path.iterdir()}
    assert main(["verify", str(copy.parent)]) == main(["ls", str(copy.parent)]) == main(["ls", str(pair.roots[0])]) == 0
    assert "no checkpoints" in capsys.readouterr().out  # in the store itself, which does not count them
    assert pair.trainers[0].save(7).exists() and pair.there() == [1]
    assert pair.ranks[1].tally.counts() == (1, 0, 1)


def test_the_newest_stay_and_what_their_rank_still_needs(pair):
    pair.begin()
    for step in (1, 2, 3, 4, 5):
        pair.save(step)
        assert pair.send(step, held=[1] if step < 5 else [])
        assert pair.there() == {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 3, 4], 5: [4, 5]}[step]
    assert pair.send(5) and pair.ranks[1].tally.counts() == (6, 0, 5)  # it is there already
    flip(replicas(pair.roots[0], 1)[-1] / "model.safetensors")
    assert pair.send(5) and pair.there() == [4, 5]  # what rotted is sent again
    found = pair.ranks[0].here()
    assert [(rank, each.record.step) for rank, each in found] == [(1, 4), (1, 5)]


def test_what_is_left_of_other_lives_goes_once_as_many_of_this_one_are_complete_as_are_kept(pair):
    pair.begin()
    pair.save(1)
    assert pair.send(1)
    for each in pair.ranks:
        each.begins("next")
    pair.ranks[0].complete((2, 2, "next"))
    assert pair.there() == [1]
    pair.ranks[0].complete((3, 3, "next"))
    assert pair.there() == []


def test_a_bit_that_flips_on_the_wire_is_refused_on_arrival_and_said(pair, caplog):
    flips = [True]

    def change(data):
        if flips and len(data) == 4096:  # of a file
            flips.clear()
            return data[:-1] + bytes([data[-1] ^ 4])
        return data

    pair.begin(Between(pair.ranks[0].port, change).port)
    pair.save(1)
    assert not pair.send(1) and not flips and pair.there() == []
    assert "the record says" in caplog.text and "step 1 has no replica with rank 0" in caplog.text
    assert pair.send(1) and pair.there() == [1] and "replicas lie with rank 0 again" in caplog.text
    assert pair.ranks[1].tally.counts() == (1, 1, 1)


def test_a_transfer_that_ends_in_the_middle_leaves_no_half_replica_by_name(pair):
    ends = [True]

    def change(data):
        if ends and len(data) == 4096:
            ends.clear()
            raise OSError("killed here")
        return data

    pair.begin(Between(pair.ranks[0].port, change).port)
    pair.save(1)
    assert not pair.send(1) and not ends and replicas(pair.roots[0], 1) == []
    assert pair.send(1) and pair.there() == [1]


def test_a_peer_that_is_dead_costs_no_checkpoint_and_is_said_once(pair, caplog):
    pair.begin()
    pair.ranks[0].close()
    for step in (1, 2):
        pair.save(step)
        assert not pair.send(step)
    assert caplog.text.count("has no replica with rank 0") == 1 and pair.ranks[1].tally.counts() == (0, 2, None)


def test_a_stranger_gets_nothing_and_leaves_nothing(pair):
    pair.begin()
    pair.save(1)
    assert pair.send(1)
    before = sorted(pair.roots[0].rglob("*"))
    with connected("127.0.0.1", pair.ranks[0].port) as line, pytest.raises(Lost):
        line.prove(b"x" * SECRET)
    with socket.create_connection(("127.0.0.1", pair.ranks[0].port), 30) as sock:
        sock.sendall(bytes(3 * SECRET) + b'{"op": "get", "rank": 1, "key": [1, 1, ""]}')
        heard = b""
        with suppress(ConnectionResetError):
            while data := sock.recv(4096):
                heard += data
    assert len(heard) == SECRET  # a random number, and no answer
    assert sorted(pair.roots[0].rglob("*")) == before


def test_who_is_silent_or_too_slow_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with Line(near) as line:
        line.allow(0, idle=0.05)
        with pytest.raises(Lost, match="does not answer in time"):
            line.read(memoryview(bytearray(1)))
        line.allow(0, idle=0.2)
        drips = threading.Thread(target=lambda: [far.send(b"x") and time.sleep(0.02) for _ in range(50)])
        drips.start()
        with pytest.raises(Lost, match="too slow"):
            line.read(memoryview(bytearray(50)))
        drips.join()
    far.close()


@pytest.mark.parametrize(
    "said",
    [{"rank": 1, "record": 1 << 60, "held": []}, {"rank": -1, "record": 9, "held": []}, {"rank": 1, "record": 9, "held": 7}],
)
def test_sizes_and_names_from_the_wire_are_bounded_before_anything_is_made_of_them(pair, said):
    pair.begin()
    with pair.ranks[1]._connect(0) as line:  # knows the secret, and lies
        line.say({"op": "put"})
        line.say(said)
        with pytest.raises(Lost):
            line.hear()
    assert not (pair.roots[0] / "replicas").exists()


def test_a_record_with_a_path_for_a_name_and_a_link_for_a_directory_lead_nowhere(pair, tmp_path):
    pair.begin()
    raw = Reader(pair.save(1)).raw
    outside = tmp_path / "outside"
    outside.mkdir()
    (pair.roots[0] / "replicas").symlink_to(outside)
    folder = ReplicaFolder(str(pair.roots[0]), 2)
    evil = Record.from_bytes(raw, "x")
    for name in ("../evil", "commit.json.tmp"):
        files = (dataclasses.replace(evil.files[0], name=name), *evil.files[1:])
        with pytest.raises(Corrupt), folder.arriving(1, dataclasses.replace(evil, files=files, layers=()).to_bytes()):
            pass
    assert pair.send(1) and pair.there() == [1]
    assert list(outside.iterdir()) == [] and (pair.roots[0] / "replicas.bad").is_symlink()


# ---- who keeps whose, and which step all send ----


def test_the_keeper_is_on_another_host_where_there_is_one():
    assert [keeper_of(rank, ["a", "a", "b", "b"]) for rank in range(4)] == [2, 3, 0, 1]
    assert [keeper_of(rank, ["a", "b", "a", "b"]) for rank in range(4)] == [3, 0, 1, 2]
    assert [keeper_of(rank, ["a", "a", "a", "b"]) for rank in range(4)] == [3, 3, 3, 0]
    assert [keeper_of(rank, ["a", "a", "a"]) for rank in range(3)] == [1, 2, 0]


def test_a_load_knows_all_disks_and_which_steps_no_single_one_takes_away():
    old, one, two = (3, 3, "old"), (1, 1, "new"), (2, 2, "new")

    def kept(rank, key, number, generation, amid=False):
        return [rank, *key, amid, number, generation]

    said = [
        {"keys": [two, old], "kept": [kept(0, two, 7, 2), kept(0, old, 6, 9), kept(1, old, 6, 5), kept(1, one, 7, 6)]},
        {"keys": [], "kept": [kept(1, two, 7, 1, amid=True), kept(0, one, 7, 1), kept(0, two, 7, 2), kept(1, one, 7, 6)]},
        {"keys": [], "kept": [kept(0, one, 7, 1), kept(1, two, 7, 1, amid=True)]},
    ]
    assert available(said, 0) == [two, one, old] and available(said, 1) == [one, old, two] and available(said, 2) == []
    assert holders(said, 1, one) == [0, 1] and newest_common(said, set()) is None
    assert newest_common(said[:2], set()) == two and newest_common(said[:2], {two}) == one
    said = said[:2]
    said[0]["kept"].append(kept(0, one, 7, 1))
    assert safe(said, two) == safe(said, one) == [one] and safe(said, old) == []
    assert Holder(0, two, safe(said, two)).held() == {one, two}


def test_what_every_replica_has_stays_with_every_rank_until_all_have_a_newer_one():
    complete = 0
    for seed in range(100):
        draw = random.Random(seed)
        ranks = [Holder(rank, None) for rank in range(3)]
        disks: list[set] = [set() for _ in ranks]  # what each rank's store has
        away: list[set] = [set() for _ in ranks]  # and what of it lies elsewhere
        promises, sent = [Promise() for _ in ranks], [None] * 3
        decision, step = Decision(None, (-1,) * 3), 0
        for _ in range(300):
            at = draw.randrange(3)
            match draw.randrange(4):
                case 0:
                    step += 1
                    for disk in disks:  # some fail
                        disk |= {(step, step, "")} if draw.random() < 0.9 else set()
                case 1:
                    if not ranks[at].waits:
                        promises[at] = ranks[at].make(sorted(disks[at])[-2:])
                    target = ranks[at].aim.target
                    if target is not None and (sent[at] is None or sent[at][0] != target):
                        assert target in disks[at]  # it is still there when it is heard of
                        good = draw.random() < 0.95
                        away[at] = {key for key in away[at] if key in ranks[at].aim.keys} | ({target} if good else set())
                        sent[at] = (target, good)
                case 2:
                    decision = decide(decision, promises)
                    decision = dataclasses.replace(decision, aim=aim_next(decision.aim, decision.common, sent))
                case 3:
                    ranks[at].hear(decision)
            disks = [{*sorted(disk)[-2:], *(disk & rank.held())} for disk, rank in zip(disks, ranks)]
            for key in decision.aim.complete:
                assert all(key in disk for disk in disks) and all(key in each for each in away)
        complete += len(decision.aim.complete)
    assert complete > 100  # there is progress


WRONG = [
    ({"replicas": 2}, "expected 0, or 1"),
    ({"replicas": True}, "expected 0, or 1"),
    ({"replicas": 1, "every": 1, "journal": 4}, "leave one of the two out"),
]


@pytest.mark.parametrize(("options", "why"), WRONG)
def test_what_cannot_be_is_refused_by_name(options, why):
    with pytest.raises(SetupError, match=why):
        Config(**options)


def test_ranks_that_write_one_store_are_refused_and_a_job_of_one_is_told(root, monkeypatch, caplog):
    monkeypatch.setattr(together, "world_size", lambda: 2)
    with pytest.raises(SetupError, match=r"all ranks write one store.*another directory on every rank"):
        together.replicate(str(root), 2, (0, 2))
    with pytest.raises(SetupError, match="init_process_group"):
        together.replicate(str(root), 2, (0, 1))
    monkeypatch.undo()
    assert together.replicate(str(root), 2, (0, 1)) is None and "needs other ranks" in caplog.text


def flip(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
