"""Files: written whole or not at all, and damage is named."""

import json
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from codebook_tutorial.files import (
    DamagedError,
    checksum,
    read_json,
    reading,
    same_settings,
    seal,
    sweep,
    unseal,
    write,
    write_json,
    write_text,
)


def test_a_fault_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old ⏎\n")

    def fault(part):
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, fault)
    assert path.read_bytes() == "old ⏎\n".encode() and os.listdir(path.parent) == ["a.txt"]
    with pytest.raises(TypeError):
        write_json(path, dict(a=object()))
    assert path.read_text(encoding="utf-8") == "old ⏎\n"
    write_json(path, dict(a=[1]))
    assert path.read_text() == '{\n "a": [\n  1\n ]\n}\n' and os.listdir(path.parent) == ["a.txt"]


def test_the_file_is_not_there_before_it_is_whole(tmp_path):
    path, seen = tmp_path / "a", []
    for shared in (False, True):
        write(
            path,
            lambda part: (part.write_text("x"), seen.append(os.listdir(tmp_path))),
            shared=shared,
        )
        assert path.read_text() == "x"
        path.unlink()
    assert seen[0] == ["a.part"] and seen[1] == [f"a.{os.getpid()}.{threading.get_ident()}.part"]


def test_others_may_read_what_safetensors_wrote(tmp_path):
    (tmp_path / "plain").touch()
    write(tmp_path / "a.safetensors", lambda part: save_file(dict(a=torch.ones(2)), part))
    modes = {p.stat().st_mode for p in tmp_path.iterdir()}
    assert len(modes) == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("raw", [None, b"", b'{"a": 1', b"[1]", b"3", b"\xff{}"])
def test_anything_but_a_json_object_is_damaged(tmp_path, raw):
    path = tmp_path / "a.json"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(
        DamagedError, match=r"^f: .*a\.json is missing, damaged or cut short .*; call g$"
    ):
        read_json(path, "f", "call g")
    path.write_text('{"a": 1}')
    assert read_json(path, "f") == dict(a=1)


def test_any_error_while_reading_names_the_file_once():
    with pytest.raises(ValueError, match=r"^f: outer is missing.*KeyError: 'x'"):
        with reading("outer", "f"):
            {}["x"]
    with pytest.raises(ValueError, match="^g: inner is missing"):
        with reading("outer", "f"), reading("inner", "g"):
            raise OSError("x")
    with pytest.raises(KeyboardInterrupt), reading("outer", "f"):
        raise KeyboardInterrupt


def test_a_flipped_byte_and_a_missing_file_are_named(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 1000)
    marks = json.loads(json.dumps(seal(tmp_path, "abc")))
    assert marks["a"] == checksum(tmp_path / "a") and list(marks) == ["a", "b", "c"]
    unseal(tmp_path, marks, "f")
    raw = (tmp_path / "b").read_bytes()
    (tmp_path / "b").write_bytes(raw[:500] + bytes([raw[500] ^ 1]) + raw[501:])
    with pytest.raises(
        DamagedError, match=r"f: .*b is missing, damaged.*checksum differs.*; try h"
    ):
        unseal(tmp_path, marks, "f", todo="try h")
    (tmp_path / "b").unlink()
    with pytest.raises(DamagedError, match=r"f: .*b is missing"):
        unseal(tmp_path, marks, "f")


def test_settings_that_differ_are_named_and_the_others_not():
    old = dict(steps=4, site="mlp.0", text="a" * 64, gone=1)
    same_settings("f", "there", old=old, new=dict(old))
    with pytest.raises(ValueError) as e:
        new = dict(steps=8, site="mlp.0", text="b" * 64, added=None)
        same_settings("f", "there", old=old, new=new)
    says = str(e.value)
    assert says.startswith("f: there was started with different settings (steps: 4 then, 8 now, ")
    assert "text: aaaaaaaa... then, bbbbbbbb... now" in says and "site" not in says
    assert "added: not set then, None now" in says and "gone: 1 then, not set now" in says


def test_sweep_deletes_what_was_left_half_written_and_nothing_else(tmp_path):
    for name in ("a.part", ".tmpAbC123", "a", "tmp", "b.partly"):
        (tmp_path / name).touch()
    (tmp_path / "c.part" / "d").mkdir(parents=True)
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "tmp", "b.partly"}
    sweep(tmp_path, ["a*"])
    assert not (tmp_path / "a").exists()
    sweep(tmp_path / "nowhere")
