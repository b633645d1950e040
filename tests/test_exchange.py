"""A stranger's file: hostile, damaged, renamed or half of a model. Nothing of it is run, nothing is half-written, and what is wrong is said in words."""
import argparse
import builtins
import collections
import functools
import io
import os
import pickle
import struct
import subprocess
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from commands import run_line
from safetensors.torch import save_file

from medvis.exchange.doctor import examine
from medvis.exchange.importing import import_checkpoint
from medvis.exchange.reader import UnsafeFile, read_checkpoint

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)}


class Calls:
    "A pickle that calls a function, and then perhaps sets a state."

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def gadgets(mark: Path) -> dict[str, object]:
    shell, write = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    return {
        "os.system": Calls(os.system, shell),
        "subprocess": Calls(subprocess.getoutput, shell),
        "eval": Calls(eval, write),
        "exec": Calls(exec, write),
        "open": Calls(open, str(mark), "w"),
        "import": Calls(__import__, "antigravity"),
        "partial": Calls(functools.partial, os.mkdir, str(mark)),
        "called partial": Calls(Calls(functools.partial, os.mkdir), str(mark)),
        "getattr": Calls(getattr, {}, "keys"),
        "a bound method": Calls({}.update, {"a": 1}),
        "map": Calls(map, print, [1]),
        "torch.load": Calls(torch.load, str(mark)),
        "torch.hub": Calls(torch.hub.load, "a/b", "c"),
        "numpy.load": Calls(np.load, str(mark), None, True),
        "pickle.loads": Calls(pickle.loads, b"."),
        "a function type": Calls(types.FunctionType, None, {}),
        "in a defaultdict": collections.defaultdict(os.getcwd, a=1),
        "as an argument of a setting": argparse.Namespace(a=Calls(os.mkdir, str(mark))),
        "as a state": Calls(argparse.Namespace, state=Calls(os.mkdir, str(mark))),
        "as a key": {Calls(os.getcwd): 1},
        "nested": {"a": [{"b": (1, Calls(os.mkdir, str(mark)))}]},
        "beside a tensor": {"weight": torch.ones(2), "x": Calls(os.mkdir, str(mark))},
    }


@pytest.mark.parametrize("name", gadgets(Path("mark")))
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["beside", "inside", "alone"])
def test_a_hostile_file_is_refused_by_name(name, new, where, tmp_path):
    mark, gadget = tmp_path / "mark", gadgets(tmp_path / "mark")[name]
    if name in ("a function type", "called partial"):
        gadget = {"called partial": lambda: Calls(functools.partial, os.mkdir, str(mark)), "a function type": lambda: Calls(types.SimpleNamespace)}[name]()
    content = {"beside": {"state_dict": WEIGHTS, "hyper_parameters": gadget}, "inside": {"state_dict": WEIGHTS | {"x": gadget}}, "alone": gadget}[where]
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=new)
    for work in (read_checkpoint, examine, lambda file: import_checkpoint(file, tmp_path / "run"))[: 3 if where == "inside" else 1]:
        with pytest.raises(UnsafeFile, match="it asks for .* Nothing of it was run"):
            work(tmp_path / "model.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def written(tmp_path, program: bytes) -> Path:
    "A file of torch whose pickle is this."
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    return tmp_path / "model.pt"


PROGRAMS = {                                                    # by hand: what no pickler writes
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "inst": b"(S'true'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'true'\no.",
    "dotted name": b"\x80\x04\x8c\x11omegaconf.nothing\x8c\x0bx.os.system\x93.",
    "attribute of a maker": b"\x80\x04\x8c\x0ctorch._utils\x8c\x1f_rebuild_tensor_v2.__globals__\x93.",
    "state of a maker": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x02X\x02\x00\x00\x00osQ.",
    "a storage of no type": b"\x80\x02(X\x07\x00\x00\x00storagecargparse\nNamespace\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
    "endless": b"\x80\x02" + b"]" * 10,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_no_pickler_writes(name, tmp_path):
    with pytest.raises(ValueError, match="model.pt"):
        read_checkpoint(written(tmp_path, PROGRAMS[name]))
    if name in ("stack global", "inst", "obj"):
        with pytest.raises(UnsafeFile, match="os.system"):
            read_checkpoint(written(tmp_path, PROGRAMS[name]))


def test_nothing_lasts(tmp_path):
    "What one pickle sets on what it was given is not met by the next file."
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\x00\x00\x00evilK\x01sb."
    with pytest.raises(ValueError):
        read_checkpoint(written(tmp_path, program))
    torch.save(WEIGHTS, tmp_path / "good.pt")
    assert torch.equal(read_checkpoint(tmp_path / "good.pt").state["layer.weight"], WEIGHTS["layer.weight"])


@pytest.mark.parametrize(("change", "words"), [
    (dict(size=(10**9, 10**9)), "does not fit its storage"), (dict(offset=5), "does not fit its storage"), (dict(stride=(100, 1)), "does not fit its storage"),
    (dict(offset=-1), "does not fit its storage"), (dict(size=(2, 3), stride=(0, 1), offset=6), "does not fit its storage"), (dict(size=("a", 3)), "does not fit its storage")])
def test_a_tensor_stays_in_its_storage(change, words, tmp_path):
    torch.save(WEIGHTS, tmp_path / "model.pt")
    asked = dict(size=(2, 3), stride=(3, 1), offset=0) | change

    class Tensor(Calls):
        def __init__(self):
            super().__init__(torch._utils._rebuild_tensor_v2, Saved(), asked["offset"], asked["size"], asked["stride"], False, collections.OrderedDict())

    class Saved:
        pass

    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", torch.FloatStorage, "0", "cpu", 6) if isinstance(thing, Saved) else None

    Pickler(buffer, 2).dump({"weight": Tensor()})
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("a/data.pkl", buffer.getvalue())
        archive.writestr("a/data/0", np.arange(6, dtype=np.float32).tobytes())
    with pytest.raises(ValueError, match=words):
        read_checkpoint(tmp_path / "model.pt")


def vit() -> dict[str, torch.Tensor]:
    return timm.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=0).state_dict()


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_named(suffix, share, tmp_path):
    whole = tmp_path / f"whole{suffix}"
    save_file(vit(), whole) if suffix == ".safetensors" else torch.save(vit(), whole, _use_new_zipfile_serialization=suffix == ".pt")
    assert import_checkpoint(whole, tmp_path / "run").manifest["imported"]["kind"] == "timm-vit"
    content, half = whole.read_bytes(), tmp_path / f"half{suffix}"
    half.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=f"half{suffix}"):
        import_checkpoint(half, tmp_path / "new")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("new")]


@pytest.mark.parametrize("name", ["zip.safetensors", "safetensors.pt", "legacy.ckpt", "zip"])
def test_the_name_of_a_file_does_not_matter(name, tmp_path):
    if name == "safetensors.pt":
        save_file(WEIGHTS, tmp_path / name)
    else:
        torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization="zip" in name)
    assert torch.equal(read_checkpoint(tmp_path / name).state["layer.weight"], WEIGHTS["layer.weight"])


def test_a_folder_in_pieces(tmp_path):
    "Two shards and their index; one of them missing is said."
    state, names = vit(), sorted(vit())
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {%s}}' % ", ".join(f'"{name}": "{file}"' for file, held in parts.items() for name in held))
    assert read_checkpoint(tmp_path).state.keys() == state.keys()
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model-2.safetensors"):
        read_checkpoint(tmp_path)


def test_half_converted_and_left_over(tmp_path):
    state = vit()
    mixed = {name.replace("blocks.0.attn.proj", "encoder.layer.0.attention.output.dense"): value for name, value in state.items()}
    torch.save(mixed, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match="2 of its weights have no place in that: encoder.layer.0.attention.output.dense"):
        import_checkpoint(tmp_path / "mixed.pt", tmp_path / "run")
    with pytest.raises(ValueError, match="it lacks image_encoder.body.blocks.0.attn.proj.weight"):
        import_checkpoint(tmp_path / "mixed.pt", tmp_path / "run", leave_unknown=True)
    torch.save(state | {"norm.weight": torch.full((64,), torch.nan)}, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="NaN"):
        import_checkpoint(tmp_path / "nan.pt", tmp_path / "run")
    torch.save(state | {"norm.weight": torch.ones(63)}, tmp_path / "shape.pt")
    with pytest.raises(ValueError, match=r"image_encoder.body.norm.weight has the shape \(63,\); expected \(64,\)"):
        import_checkpoint(tmp_path / "shape.pt", tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed.pt", "nan.pt", "shape.pt"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    torch.save(vit(), tmp_path / "model.pt")
    monkeypatch.setattr("medvis.exchange.importing.save_weights", full)
    with pytest.raises(OSError, match="No space"):
        import_checkpoint(tmp_path / "model.pt", tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def test_safetensors_with_a_false_header(tmp_path):
    for header in (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}', b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,16]}}', b"{"):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            read_checkpoint(tmp_path / "model.safetensors")


def test_the_command_line(tmp_path):
    torch.save(vit(), tmp_path / "vit.pth")
    code, said = run_line(f"medvis import {tmp_path / 'vit.pth'} --out {tmp_path / 'run'}")
    assert code == 0 and f"Run: {tmp_path / 'run'}\nNext: medvis probe" in said and (tmp_path / "run/weights.safetensors").is_file()
    torch.save({"model": vit(), "x": Calls(builtins.print, 1)}, tmp_path / "hostile.pth")
    code, said = run_line(f"medvis doctor {tmp_path / 'hostile.pth'}")
    assert code == 1 and "builtins.print" in said and "Traceback" not in said


@pytest.mark.parametrize(("file", "content", "words"), [
    ("config.json", b"{bad", "it is no JSON"), ("config.json", b"[1]", "it holds a list"), ("preprocessor_config.json", b"\xff\xfe{", "it is no JSON"), ("config.json", b"[" * 100_000, "it is no JSON"),
    ("model.safetensors.index.json", b"{}", "it says of no weight"), ("model.safetensors.index.json", b'{"weight_map": {"a": 3}}', "it says of no weight"), ("model.safetensors.index.json", b"nope", "it is no JSON")])
def test_a_folder_whose_settings_are_damaged(file, content, words, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    if "index" not in file:
        save_file(vit(), folder / "model.safetensors")
    (folder / file).write_bytes(content)
    for work in (read_checkpoint, examine, lambda place: import_checkpoint(place, tmp_path / "run")):
        with pytest.raises(ValueError, match=f"folder/{file} cannot be read: {words}"):
            work(folder)


@pytest.mark.parametrize("change", [{"pos_embed": torch.tensor(1.0)}, {"patch_embed.proj.weight": torch.zeros(9)}, {"patch_embed.proj.weight": torch.zeros(0)}, {"blocks.0.attn.qkv.weight": torch.tensor(1.0)},
                                    {"cls_token": torch.zeros(0)}, {"pos_embed": torch.zeros(1, 2, 3, 64)}], ids=str)
def test_a_weight_of_another_rank_is_a_fault_of_the_file(change, tmp_path):
    "Sizes are read from the shapes of weights; what a false one runs into is said of the file, and by the doctor too."
    torch.save(vit() | change, tmp_path / "false.pt")
    with pytest.raises(ValueError, match="false.pt"):
        import_checkpoint(tmp_path / "false.pt", tmp_path / "run")
    try:
        assert "stop" in set(examine(tmp_path / "false.pt")["weight"])
    except ValueError as error:
        assert "false.pt" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["false.pt"]


def test_arrays_of_numpy_beside_the_weights(tmp_path):
    "The state of a random generator is no reason to refuse a file; nothing is made of it."
    torch.save({"state_dict": vit(), "rng": np.random.RandomState(0).get_state(), "best": np.ones(3)}, tmp_path / "model.pt")
    assert read_checkpoint(tmp_path / "model.pt").state.keys() == vit().keys()


def test_what_lies_beside_the_run_stays(tmp_path):
    torch.save(vit(), tmp_path / "model.pt")
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial/mine.txt").write_text("mine")
    for size in (0, -16, 17):
        with pytest.raises(ValueError, match=f"size is {size}"):
            import_checkpoint(tmp_path / "model.pt", tmp_path / "run", size=size)
    import_checkpoint(tmp_path / "model.pt", tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "run", "run.partial"] and (tmp_path / "run.partial/mine.txt").is_file()
