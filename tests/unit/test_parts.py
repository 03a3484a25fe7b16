"""models.imports and models.parts: a file becomes parts, and parts become a window's files."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf as reference
import msgspec
import numpy as np
import pytest

from backends.base import Cuts, Recipe, Stub
from peer.errors import GGUFError, ModelError, PartError
from peer.models import disk, gguf, parts
from peer.models.manifest import Manifest, decode, load
from peer.models.store import Store
from tests import gguf_files
from tests.gguf_files import File, Tensor


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def imported(store: Store, file: File, folder: Path, name: str = "model.gguf") -> Manifest:
    return parts.import_gguf(file.write(folder / name), store)


def arrays(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes, read by the gguf package."""
    return {t.name: t.data.tobytes() for t in reference.GGUFReader(path).tensors}


def value(path: Path, key: str) -> object:
    """A metadata value, read by the gguf package."""
    return reference.GGUFReader(path).fields[key].contents()


def recipe(first: int, last: int, layers: int, tied: bool) -> Recipe:
    """A recipe as the llama.cpp engine gives them."""
    write = {"llama.block_count": ("uint32", last - first)}
    if last == layers:
        return Recipe(write, embed=tied, output=not tied)
    stubs = (Stub("token_embd.weight", (32, 1)),)
    write["llama.vocab_size"] = ("uint32", 1)
    return Recipe(write, drop=("tokenizer.",), stubs=stubs)


def split_gguf(path: Path, folder: Path, count: int = 3) -> list[Path]:
    """The same model in several files, as `llama-gguf-split` writes them."""
    whole = gguf.read(path)
    data = path.read_bytes()
    shares = np.array_split(np.arange(len(whole.tensors)), count)
    paths = []
    for number, share in enumerate(shares):
        metadata = dict(whole.metadata) if number == 0 else {}
        metadata["split.no"] = gguf.Value("uint16", number)
        metadata["split.count"] = gguf.Value("uint16", count)
        metadata["split.tensors.count"] = gguf.Value("int32", len(whole.tensors))
        tensors = [whole.tensors[i] for i in share]
        out = gguf.header_bytes(metadata, [(t.name, t.shape, t.type) for t in tensors])
        for t in tensors:
            out += data[t.offset : t.offset + t.size].ljust(gguf.aligned(t.size), b"\0")
        paths.append(folder / f"big-{number + 1:05d}-of-{count:05d}.gguf")
        paths[-1].write_bytes(out)
    return paths


def test_an_imported_model_is_its_parts_with_their_hashes(store: Store, tmp_path: Path) -> None:
    manifest = imported(store, gguf_files.model(tied=False), tmp_path)
    folder = store.folder(manifest.digest)
    assert sorted(path.name for path in folder.glob("*.gguf")) == [
        "embed.gguf", "head.gguf", "layer-000.gguf", "layer-001.gguf", "layer-002.gguf",
        "output.gguf",
    ]  # fmt: skip
    assert hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() == folder.name
    original = arrays(tmp_path / "model.gguf")
    found: dict[str, bytes] = {}
    for part in manifest.parts:
        data = (folder / part.file).read_bytes()
        assert part.header_bytes % 4096 == 0
        assert len(data) == part.header_bytes + part.data_bytes
        assert hashlib.sha256(data[part.header_bytes :]).hexdigest() == part.sha256
        found.update(arrays(folder / part.file))  # every part is a GGUF of its own
        assert all((part.header_bytes + t.offset) % 32 == 0 for t in part.tensors)
    assert found == original
    assert set(arrays(folder / "head.gguf")) == {"rope_freqs.weight", "output_norm.weight"}
    assert value(folder / "head.gguf", "tokenizer.ggml.tokens") == [f"<{i}>" for i in range(40)]


def test_progress_counts_up_to_all_bytes(store: Store, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = gguf_files.model().write(tmp_path / "model.gguf")
    parts.import_gguf(path, store, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(t.size for t in gguf.read(path).tensors)


def test_importing_twice_is_one_model_with_the_time_of_the_second(
    store: Store, tmp_path: Path
) -> None:
    first = imported(store, gguf_files.model(), tmp_path)
    os.utime(store.folder(first.digest) / "manifest.json", (5.0, 5.0))
    assert store.models()[0].pulled_s == 5.0
    before = time.time() - 1
    assert imported(store, gguf_files.model(), tmp_path) == first
    assert len(list(store.root.iterdir())) == 1
    assert store.models()[0].pulled_s > before


def test_importing_again_mends_what_is_damaged_or_missing(store: Store, tmp_path: Path) -> None:
    manifest = imported(store, gguf_files.model(), tmp_path)
    folder = store.folder(manifest.digest)
    damaged = bytearray((folder / "layer-001.gguf").read_bytes())
    damaged[5000] ^= 1
    (folder / "layer-001.gguf").write_bytes(damaged)
    (folder / "layer-002.gguf").unlink()
    imported(store, gguf_files.model(), tmp_path)
    for part in manifest.parts:
        store.verify(manifest.digest, part.name)


def test_a_model_in_several_files_becomes_the_same_parts(store: Store, tmp_path: Path) -> None:
    whole = imported(store, gguf_files.model(layers=5), tmp_path)
    paths = split_gguf(tmp_path / "model.gguf", tmp_path)
    for path in paths:  # any one of them will do
        assert parts.import_gguf(path, store) == whole


def test_a_missing_or_foreign_split_file_is_named(store: Store, tmp_path: Path) -> None:
    gguf_files.model(layers=5).write(tmp_path / "model.gguf")
    paths = split_gguf(tmp_path / "model.gguf", tmp_path)
    shutil.copy(paths[0], tmp_path / "alone.gguf")
    with pytest.raises(GGUFError, match="by its name file 0 of 1"):
        parts.import_gguf(tmp_path / "alone.gguf", store)
    shutil.copy(paths[2], paths[1])
    with pytest.raises(GGUFError, match=r"file 2 \(from 0\) of 3, by its name file 1"):
        parts.import_gguf(paths[0], store)
    paths[1].unlink()
    with pytest.raises(GGUFError, match=paths[1].name):
        parts.import_gguf(paths[0], store)
    assert list(store.root.iterdir()) == []


NAMES = {
    "smollm2-135m-instruct-q4_1": {
        "general.name": ("string", "Smollm2 135M 8k Lc100K Mix1 Ep2"),
        "general.basename": ("string", "smollm2"),
        "general.size_label": ("string", "135M"),
        "general.finetune": ("string", "8k-lc100k-mix1-ep2"),
        "general.file_type": ("uint32", 3),
    },
    "qwen3-0.6b-instruct-v0.2-q4_k_m": {
        "general.basename": ("string", "Qwen3"),
        "general.size_label": ("string", "0.6B"),
        "general.finetune": ("string", "Instruct"),
        "general.version": ("string", "v0.2"),
        "general.file_type": ("uint32", 15),
    },
    "tiny-model-q8_0": {},
    "etc-passwd-2e-2e-q8_0": {"general.name": ("string", "../../etc/passwd\0%2e%2e")},
    "model-q8_0": {"general.name": ("string", "．．／環")},
    "long-" + "o" * 54 + "-q8_0": {"general.name": ("string", "long-" + "o" * 5000)},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_models_id_is_readable_and_safe(name: str, store: Store, tmp_path: Path) -> None:
    file = gguf_files.model(metadata=NAMES[name])  # type: ignore[arg-type]
    manifest = imported(store, file, tmp_path, "環.gguf")
    assert manifest.model == name
    assert len(manifest.model) <= 64
    assert store.folder(manifest.digest).parent == store.root


def test_without_a_name_in_it_the_files_own_name_is_used(store: Store, tmp_path: Path) -> None:
    file = gguf_files.model()
    file.metadata = [m for m in file.metadata if m[0] not in ("general.name", "general.file_type")]
    assert imported(store, file, tmp_path, "My Model.Q8_0.gguf").model == "my-model-q8_0"


def without(name: str) -> File:
    file = gguf_files.model()
    file.tensors = [t for t in file.tensors if not str(t.name).startswith(name)]
    file.metadata = [m for m in file.metadata if not str(m[0]).startswith(name)]
    return file


WRONG = {
    "no layers": (without("llama.block_count"), "block_count is 0"),
    "an empty layer": (without("blk.1."), "layer 1 of 3 has no tensors"),
    "no embedding": (without("token_embd"), "token_embd.weight is missing"),
    "no architecture": (without("general.architecture"), "general.architecture is ''"),
    "a layer too many": (
        gguf_files.model(extra=[Tensor("blk.3.attn_norm.weight", (32,))]),
        "beyond the model's 3",
    ),
    "half an output head": (gguf_files.model(extra=[Tensor("output.bias", (40,))]), "output.bias"),
    "absurdly many layers": (
        gguf_files.model(metadata={"llama.block_count": ("uint32", 1 << 31)}),
        "block_count is 2147483648",
    ),
    "an architecture that is a path": (
        gguf_files.model(metadata={"general.architecture": ("string", "../x")}),
        "names no architecture",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_whole_model_is_refused_and_leaves_nothing(
    case: str, store: Store, tmp_path: Path
) -> None:
    file, words = WRONG[case]
    with pytest.raises(GGUFError) as caught:
        imported(store, file, tmp_path)
    assert words in str(caught.value) or words == "output.bias"
    assert list(store.root.iterdir()) == []


def test_a_damaged_file_is_refused_before_anything_is_written(store: Store, tmp_path: Path) -> None:
    path = gguf_files.model().write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(GGUFError, match="cut short"):
        parts.import_gguf(path, store)
    with pytest.raises(ModelError, match="there is no file"):
        parts.import_gguf(tmp_path / "none.gguf", store)
    assert list(store.root.iterdir()) == []


class Interrupted(Exception):
    pass


def interrupt(done: int, total: int) -> None:
    if done > total // 2:
        raise Interrupted


def test_an_interrupted_import_leaves_nothing_and_the_old_models_intact(
    store: Store, tmp_path: Path
) -> None:
    old = imported(store, gguf_files.model(), tmp_path)
    path = gguf_files.model(layers=6).write(tmp_path / "other.gguf")
    with pytest.raises(Interrupted):
        parts.import_gguf(path, store, interrupt)
    assert [entry.name for entry in store.root.iterdir()] == [old.digest]
    assert store.stored(old.digest).complete


KILLED = """
import os, signal, sys
from pathlib import Path
from peer.models import parts
from peer.models.store import Store
def kill(done, total):
    print("half", flush=True)
    signal.pause()
parts.import_gguf(Path(sys.argv[1]), Store(Path(sys.argv[2])), kill)
"""


def test_what_a_killed_import_left_is_removed_at_the_next_start_but_not_before(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    path = gguf_files.model().write(tmp_path / "model.gguf")
    command = [sys.executable, "-c", KILLED, str(path), str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"half\n"
        running = list(Store(home).root.iterdir())  # another halka starts meanwhile
        assert len(running) == 1
        assert running[0].is_dir()
        process.send_signal(signal.SIGKILL)
    assert list(Store(home).root.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 KiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_an_import_with_path_and_bytes_and_frees_the_space(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(small_disk)
    old = imported(store, gguf_files.model(), tmp_path)
    free = shutil.disk_usage(small_disk).free
    large = gguf_files.model(layers=8, hidden=256).write(tmp_path / "large.gguf")
    with pytest.raises(PartError, match=r"models: no space left .* bytes more are needed"):
        parts.import_gguf(large, store)
    # The disk filled up while it was written to: the look before did not see it coming.
    monkeypatch.setattr(disk, "require", lambda folder, needed: None)
    with pytest.raises(PartError, match=r"layer-00\d\.gguf: no space left") as caught:
        parts.import_gguf(large, store)
    assert str(small_disk) in str(caught.value)
    assert [entry.name for entry in store.root.iterdir()] == [old.digest]
    assert shutil.disk_usage(small_disk).free == free
    for part in old.parts:
        store.verify(old.digest, part.name)


@pytest.mark.parametrize("tied", [True, False])
def test_windows_hold_the_models_tensors_numbered_from_0(
    tied: bool, store: Store, tmp_path: Path
) -> None:
    manifest = imported(store, gguf_files.model(layers=12, tied=tied), tmp_path)
    folder, original = store.folder(manifest.digest), arrays(tmp_path / "model.gguf")
    for first, last in [(0, 1), (0, 12), (9, 12), (3, 7), (10, 11), (2, 12), (0, 5)]:
        asked = recipe(first, last, 12, tied)
        placed = parts.place(folder, manifest, asked, first, last, tmp_path)
        found: dict[str, bytes] = {}
        for number, path in enumerate(placed.files):
            assert value(path, "split.no") == number
            assert value(path, "split.count") == len(placed.files)
            found.update(arrays(path))
        assert value(placed.files[0], "split.tensors.count") == len(found)
        assert value(placed.files[0], "llama.block_count") == last - first
        wanted = {
            name.replace(f"blk.{layer}.", f"blk.{layer - first}."): data
            for name, data in original.items()
            for layer in range(first, last)
            if name.startswith(f"blk.{layer}.")
        }
        wanted |= {name: original[name] for name in ("rope_freqs.weight", "output_norm.weight")}
        if last == 12:
            wanted |= {n: d for n, d in original.items() if n.startswith("output.")}
            if tied:
                wanted["token_embd.weight"] = original["token_embd.weight"]
        else:
            wanted["token_embd.weight"] = bytes(128)
            assert "tokenizer.ggml.tokens" not in reference.GGUFReader(placed.files[0]).fields
        assert found == wanted
        assert placed.embed == (folder / "embed.gguf" if first == 0 and not asked.embed else None)


def test_a_stub_takes_the_place_of_the_tensor_that_it_is_named_after(
    store: Store, tmp_path: Path
) -> None:
    extra = [Tensor("position_embd.weight", (32, 16))]
    manifest = imported(store, gguf_files.model(extra=extra), tmp_path)
    stub = Stub("position_embd.weight", (32, 16))
    asked = Recipe({}, without=("rope_freqs.weight",), stubs=(stub,))
    placed = parts.place(store.folder(manifest.digest), manifest, asked, 1, 2, tmp_path)
    main = arrays(placed.files[0])
    assert set(main) == {"position_embd.weight", "output_norm.weight"}
    assert main["position_embd.weight"] == bytes(32 * 16 * 4)


def test_renamed_output_still_fits_its_header(store: Store, tmp_path: Path) -> None:
    manifest = imported(store, gguf_files.model(tied=False), tmp_path)
    asked = Recipe({}, output=True, rename={"output.weight": "token_embd.weight"})
    placed = parts.place(store.folder(manifest.digest), manifest, asked, 2, 3, tmp_path)
    original = arrays(tmp_path / "model.gguf")
    assert arrays(placed.files[-1]) == {"token_embd.weight": original["output.weight"]}


def test_the_embedding_stays_readable_and_in_its_place_for_two_windows_of_one_peer(
    store: Store, tmp_path: Path
) -> None:
    manifest = imported(store, gguf_files.model(layers=6), tmp_path)
    folder, original = store.folder(manifest.digest), arrays(tmp_path / "model.gguf")
    last = parts.place(folder, manifest, recipe(4, 6, 6, True), 4, 6, tmp_path)
    first = parts.place(folder, manifest, recipe(0, 2, 6, True), 0, 2, tmp_path)
    assert first.embed
    assert arrays(first.embed) == {"token_embd.weight": original["token_embd.weight"]}
    assert value(last.files[-1], "split.no") == 3  # the split of the last window, still
    with (folder / "embed.gguf").open("r+b") as file:
        file.write(b"x" * 4096)  # derived data may be anything
    again = parts.place(folder, manifest, recipe(0, 2, 6, True), 0, 2, tmp_path)
    assert again.embed
    assert arrays(again.embed) == {"token_embd.weight": original["token_embd.weight"]}


def test_a_mapping_in_use_sees_the_same_weights_through_every_new_plan(
    store: Store, tmp_path: Path
) -> None:
    manifest = imported(store, gguf_files.model(layers=6), tmp_path)
    folder = store.folder(manifest.digest)
    part = manifest.part("layer-003")
    with (folder / part.file).open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        inode, before = os.fstat(file.fileno()).st_ino, mapping[part.header_bytes :]
        for first, last in [(0, 4), (3, 5), (1, 6), (2, 4)]:
            parts.place(folder, manifest, recipe(first, last, 6, True), first, last, tmp_path)
            assert mapping[part.header_bytes :] == before
        assert (folder / part.file).stat().st_ino == inode
        mapping.close()


def test_headers_are_made_again_from_the_manifest_whatever_is_there(
    store: Store, tmp_path: Path
) -> None:
    manifest = imported(store, gguf_files.model(layers=4), tmp_path)
    folder, original = store.folder(manifest.digest), arrays(tmp_path / "model.gguf")
    for layer in range(4):
        with (folder / f"layer-{layer:03d}.gguf").open("r+b") as file:
            file.write(random.Random(layer).randbytes(4096))
    placed = parts.place(folder, manifest, recipe(1, 3, 4, True), 1, 3, tmp_path)
    assert arrays(placed.files[1])["blk.0.attn_q.weight"] == original["blk.1.attn_q.weight"]
    for part in manifest.parts:
        store.verify(manifest.digest, part.name)


def test_a_missing_or_short_part_is_named_before_anything_is_written(
    store: Store, tmp_path: Path
) -> None:
    manifest = imported(store, gguf_files.model(layers=4), tmp_path)
    folder, into = store.folder(manifest.digest), tmp_path / "into"
    into.mkdir()
    path = folder / "layer-002.gguf"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(PartError, match=r"layer-002\.gguf has \d+ bytes instead of"):
        parts.place(folder, manifest, recipe(1, 3, 4, True), 1, 3, into)
    path.unlink()
    with pytest.raises(PartError, match=r"layer-002\.gguf is missing"):
        parts.place(folder, manifest, recipe(1, 3, 4, True), 1, 3, into)
    path.symlink_to(folder / "layer-001.gguf")
    with pytest.raises(PartError, match=r"layer-002\.gguf is missing"):
        parts.place(folder, manifest, recipe(1, 3, 4, True), 1, 3, into)
    assert list(into.iterdir()) == []
    with pytest.raises(PartError, match="no layers 3 to 5"):
        parts.place(folder, manifest, recipe(3, 4, 4, True), 3, 5, into)


def test_whoever_holds_the_folder_finds_the_headers_as_it_placed_them(
    store: Store, tmp_path: Path
) -> None:
    manifest = imported(store, gguf_files.model(layers=8), tmp_path)
    folder = store.folder(manifest.digest)
    wrong: list[object] = []

    def load_often(first: int, last: int) -> None:
        into = tmp_path / f"{first}"
        into.mkdir()
        for _ in range(12):
            with parts.hold(folder):
                placed = parts.place(
                    folder, manifest, recipe(first, last, 8, True), first, last, into
                )
                threading.Event().wait(0.001)  # loading
                found = [value(path, "split.no") for path in placed.files]
                if found != list(range(len(placed.files))):
                    wrong.append(found)

    threads = [threading.Thread(target=load_often, args=a) for a in [(0, 6), (2, 7), (4, 8)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


HOLDER = """
import sys
from pathlib import Path
from peer.models import parts
with parts.hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
print("let go", flush=True)
"""


def test_a_placement_waits_for_the_process_that_holds_the_folder(
    store: Store, tmp_path: Path
) -> None:
    manifest = imported(store, gguf_files.model(), tmp_path)
    folder = store.folder(manifest.digest)
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        done = threading.Event()

        def place() -> None:
            parts.place(folder, manifest, recipe(0, 2, 3, True), 0, 2, tmp_path)
            done.set()

        thread = threading.Thread(target=place)
        thread.start()
        assert not done.wait(0.2)
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        assert done.wait(5)
        thread.join()


def test_the_whole_header_comes_from_head_and_manifest_alone(store: Store, tmp_path: Path) -> None:
    manifest = imported(store, gguf_files.model(tied=False), tmp_path)
    whole = gguf.read(tmp_path / "model.gguf").header()
    alone = tmp_path / manifest.digest
    alone.mkdir()
    for name in ("head.gguf", "manifest.json"):
        shutil.copy(store.folder(manifest.digest) / name, alone)
    header = parts.load_header(alone)
    assert dict(header.tensors) == dict(whole.tensors)
    assert header.metadata == whole.metadata
    shape = parts.shape_of(alone, lambda h: Cuts(h.layers, (0, 1, 2)), lambda h: (8,) * h.layers)
    assert (shape.model, shape.layers, shape.hidden, shape.context) == (manifest.model, 3, 32, 256)
    assert shape.layer_bytes == (1312, 1312, 1312) or len(set(shape.layer_bytes)) == 1
    assert (shape.tied, shape.kv_types) == (False, ("f16",))
    assert shape.output_bytes > 0


def test_a_head_that_contradicts_its_manifest_is_refused(store: Store, tmp_path: Path) -> None:
    manifest = imported(store, gguf_files.model(), tmp_path)
    other = imported(store, gguf_files.model(layers=4), tmp_path)
    folder = store.folder(manifest.digest)
    foreign = (store.folder(other.digest) / "head.gguf").read_bytes()
    (folder / "head.gguf").write_bytes(foreign)
    with pytest.raises(PartError, match=r"head\.gguf"):
        parts.load_header(folder)


Change = Callable[[dict[str, object]], None]


def change_part(key: str, value: object, part: int = 3) -> Change:
    def change(plain: dict[str, object]) -> None:
        plain["parts"][part][key] = value  # type: ignore[index]

    return change


def change_tensor(index: int, value: object, part: int = 3) -> Change:
    def change(plain: dict[str, object]) -> None:
        plain["parts"][part]["tensors"][0][index] = value  # type: ignore[index]

    return change


LIES: dict[str, Change] = {
    "format": lambda plain: plain.update(format=2),
    "id with a path": lambda plain: plain.update(model="../../etc"),
    "more layers": lambda plain: plain.update(layers=4),
    "absurd layers": lambda plain: plain.update(layers=1 << 40),
    "unknown field": lambda plain: plain.update(more=1),
    "part outside": change_part("name", "../../x"),
    "part twice": change_part("name", "layer-000"),
    "data shorter": change_part("data_bytes", 32),
    "data larger": change_part("data_bytes", 1 << 59),
    "data negative": change_part("data_bytes", -1),
    "header larger": change_part("header_bytes", 8192),
    "header of 1 GiB": change_part("header_bytes", 1 << 30),
    "hash": change_part("sha256", "x" * 64),
    "no tensors": change_part("tensors", []),
    "tensor of another layer": change_tensor(0, "blk.0.x"),
    "tensor with NUL": change_tensor(0, "blk.1.\0"),
    "type": change_tensor(1, "Q9"),
    "shape": change_tensor(2, [1 << 48, 1 << 48]),
    "shape of zero": change_tensor(2, [0]),
    "offset": change_tensor(3, 64),
    "size": change_tensor(4, 1),
    "head with a header": change_part("header_bytes", 4096, 0),
    "head of 1 TiB": change_part("data_bytes", 1 << 40, 0),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused(lie: str, store: Store, tmp_path: Path) -> None:
    data = imported(store, gguf_files.model(), tmp_path).data
    assert decode(data).data == data
    plain = msgspec.json.decode(data)
    LIES[lie](plain)
    with pytest.raises(PartError):
        decode(msgspec.json.encode(plain))


def test_a_manifest_in_other_words_or_no_manifest_is_refused(store: Store, tmp_path: Path) -> None:
    data = imported(store, gguf_files.model(), tmp_path).data
    for other in (data + b" ", b"", b"{}", b"[" * 100_000, b"\xff", data[:-1], b" " * (3 << 20)):
        with pytest.raises(PartError):
            decode(other)


def test_a_manifest_that_was_damaged_on_disk_is_said_to_be(store: Store, tmp_path: Path) -> None:
    manifest = imported(store, gguf_files.model(), tmp_path)
    folder = store.folder(manifest.digest)
    for data in (b"", manifest.data[:-1], b"\0" * 100):
        (folder / "manifest.json").write_bytes(data)
        with pytest.raises(PartError, match="damaged: remove"):
            load(folder)


def test_a_shape_that_is_not_the_manifests_is_found_out(store: Store, tmp_path: Path) -> None:
    manifest = imported(store, gguf_files.model(layers=4), tmp_path)
    shape = parts.shape_of(
        store.folder(manifest.digest),
        lambda header: Cuts(header.layers, (0,)),
        lambda header: (1,) * header.layers,
    )
    earlier = msgspec.structs.replace(shape, layer_kinds=())
    assert {parts.contradiction(manifest, told) for told in (shape, earlier)} == {""}
    for name, lie in {"layers": 3, "layer_bytes": (1,) * 4, "layer_kinds": (7,) * 4}.items():
        told = msgspec.structs.replace(shape, **{name: lie})
        assert parts.contradiction(manifest, told) == name
