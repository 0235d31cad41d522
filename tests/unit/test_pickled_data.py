"""A pickle read as data: what Python's own reader makes of harmless ones, and nothing is run by any."""

import contextlib
import copyreg
import functools
import importlib
import operator
import os
import pickle
import random
import subprocess
import tracemalloc
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autopar.runtime.pickled_data import NotAllowedError, read_data
from tests.hostile import Call

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=20,
)


@given(PLAIN, st.integers(2, 5))
def test_plain_data_is_read_as_python_reads_it(value: Any, protocol: int) -> None:
    assert read_data(pickle.dumps(value, protocol=protocol), ()) == value


def test_long_lists_and_shared_values_are_read_as_python_reads_them() -> None:
    shared = ("a", 1)
    value = {"long": list(range(5000)), "shared": [shared] * 300, **{f"key{n}": (n, shared, n) for n in range(2000)}}
    for protocol in range(2, 6):
        assert read_data(pickle.dumps(value, protocol=protocol), ()) == value


def test_an_object_is_its_class_and_state() -> None:
    found = read_data(
        pickle.dumps([torch.Size([2, 3]), types.SimpleNamespace(a=1)]), {"torch.Size", "types.SimpleNamespace"}
    )
    assert [(each.name, each.arguments, each.state) for each in found] == [
        ("torch.Size", ((2, 3),), None),
        ("types.SimpleNamespace", (), {"a": 1}),
    ]


def touch(marker: Path) -> Call:
    return Call(os.system, f"touch {marker}")


PAYLOADS = {
    "posix.system": touch,
    "pathlib.Path.touch": lambda marker: Call(Path.touch, marker),
    "builtins.eval": lambda marker: Call(eval, f"__import__('os').mknod({str(marker)!r})"),
    "builtins.exec": lambda marker: [1, {"deep": (2, Call(exec, f"import os; os.mknod({str(marker)!r})"))}],
    "builtins.getattr": lambda marker: Call(getattr, touch(marker), "real"),
    "builtins.list": lambda marker: Call(list, Call(map, os.system, [f"touch {marker}"])),
    "subprocess.Popen": lambda marker: Call(subprocess.Popen, ["touch", str(marker)]),
    "functools.partial": lambda marker: Call(functools.partial(os.system, f"touch {marker}")),
    "operator.attrgetter": lambda marker: Call(operator.attrgetter("real"), touch(marker)),
    "importlib.import_module": lambda marker: Call(importlib.import_module, "os", touch(marker)),
    "copyreg._reconstructor": lambda marker: Call(copyreg._reconstructor, int, int, touch(marker)),  # type: ignore[attr-defined]
    "types.SimpleNamespace": lambda marker: Call(types.SimpleNamespace, state={"inner": touch(marker)}),
    "_pickle.loads": lambda marker: Call(pickle.loads, pickle.dumps(touch(marker))),
    "torch.serialization.load": lambda marker: Call(torch.load, touch(marker)),
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_payload_is_named_and_not_run(name: str, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = pickle.dumps(PAYLOADS[name](marker), protocol=protocol)
    with pytest.raises((NotAllowedError, ValueError)) as caught:
        read_data(content, ())
    assert not marker.exists()
    if protocol >= 4:  # protocol 2 has the names of Python 2, and protocol 0 instructions of its own
        assert isinstance(caught.value, NotAllowedError)
        assert caught.value.name == name


@pytest.mark.parametrize("name", sorted(set(PAYLOADS) - {"subprocess.Popen", "torch.serialization.load"}))
def test_the_payloads_run_where_python_reads_them(name: str, tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(PAYLOADS[name](tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


class Victim:
    value = "as it was"


def test_an_allowed_class_is_not_changed() -> None:
    """Python's reader gives a state to a class as to any object."""
    content = b"\x80\x04c" + f"{__name__}\nVictim\n".encode() + b"(N}(\x8c\x05value\x8c\x07changedutb."
    with pytest.raises(ValueError, match="a state without an object"):
        read_data(content, {f"{__name__}.Victim"})
    assert Victim.value == "as it was"
    pickle.loads(content)
    assert Victim.value == "changed"


def test_memory_grows_with_the_pickle_whatever_it_says() -> None:
    """It stores a value at place 2^32 - 1, for which Python's reader makes room for as many."""
    tracemalloc.start()
    try:
        assert read_data(b"\x80\x04Nr\xff\xff\xff\xff.", ()) is None
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80\x04",
        b"\x80\x04K\x01K\x02.",  # two values
        b"\x80\x04\x85.",  # a tuple of what is not there
        b"\x80\x04h\x07.",  # a value that was never stored
        b"\x80\x04}]K\x01s.",  # a key without hash
        b"\x80\x04}(K\x01u.",  # a key without value
        b"\x80\x04K\x01K\x01a.",  # append to a number
        b"\x80\x04\x82\x01.",  # copyreg's extensions
        b"\x80\x04\x8c\x01xQ.",  # persistent ids
        b"(S'x'\nios\nsystem\n.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a string of 2^63 bytes
        b"\x80\x04)" + b"\x85" * 200_000 + b"}\x8c\x01ks.",
        b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",  # a key whose hash would take 200 000 frames
        pickle.dumps(b"bytes"),
        "\N{SNOWMAN}".encode() * 30,
    ],
)
def test_what_is_no_pickle_of_data(content: bytes) -> None:
    with pytest.raises(ValueError, match="not a complete pickle of plain data"):
        read_data(content, ())


def test_a_damaged_pickle_is_refused_or_read_as_data() -> None:
    """Each of its beginnings, and each of its bytes replaced by others: nothing but the two errors."""
    whole = pickle.dumps({"a": [(1, 2), (3, 4)], "b": torch.Size([7]), "c": None, 5: "text" * 20})
    draw = random.Random(0)
    for at in range(len(whole)):
        with pytest.raises(ValueError, match="not a complete pickle of plain data"):
            read_data(whole[:at], {"torch.Size"})
        for other in (whole[at] ^ 0x20, draw.randrange(256)):
            with contextlib.suppress(ValueError, NotAllowedError):
                read_data(whole[:at] + bytes([other]) + whole[at + 1 :], {"torch.Size"})
