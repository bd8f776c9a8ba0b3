"""Machines: those that ship are sane, and a file of another is taken in full or refused by file and field."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from infra.cluster.machines import MACHINES, Machine, Rates, load_machine
from infra.errors import ConfigError


@pytest.fixture
def written(tmp_path):
    """Write a machine's file; returns its path as it is typed."""

    def write(content: object, name: str = "ours.json") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_every_machine_that_ships_is_sane(machine):
    assert load_machine(machine.name) is machine
    assert machine.source
    assert 40e9 < machine.memory < 1e12
    assert 1e12 < machine.memory_bandwidth < 2e13
    # FP8 at twice BF16, which tensor cores do many times as fast as the others do FP32.
    assert machine.fp8 == pytest.approx(2 * machine.bf16, rel=1e-3)
    assert machine.bf16 > 8 * machine.fp32
    # A node's links are faster than those between nodes, and memory than both.
    assert machine.network < machine.nvlink < machine.memory_bandwidth
    assert 1e-7 < machine.nvlink_latency < 1e-4
    assert 1e-7 < machine.network_latency < 1e-4
    assert machine.gpus_per_node % 8 == 0
    assert 0 <= machine.communication_sms < machine.multiprocessors
    assert all(0.2 < getattr(machine.rates, f.name) < 1 for f in fields(Rates))


def test_the_reports_machine():
    """NVLink is 3.2 times the network's 50 GB/s, of which 40 are reached; 20 of 132 SMs (report §3.2.2)."""
    h800 = MACHINES["h800"]
    assert h800.nvlink / 50e9 == pytest.approx(3.2)
    assert h800.network == 40e9
    assert (h800.multiprocessors, h800.communication_sms, h800.gpus_per_node) == (132, 20, 8)
    assert [h800.peak(name) for name in ("fp8", "bf16", "fp32")] == [1979e12, 989.5e12, 67e12]


def test_a_file_says_how_a_machine_differs_from_another(written):
    path = written({"like": "h200", "nvlink": 1e11, "gpus_per_node": 4, "rates": {"gemm": 0.5}}, "box.json")
    h200 = MACHINES["h200"]
    assert load_machine(path) == replace(
        h200, name="box", nvlink=1e11, gpus_per_node=4, rates=replace(h200.rates, gemm=0.5)
    )


def test_without_a_likeness_the_rest_is_the_reports_machine(written):
    assert load_machine(written({"name": "mine"})) == replace(MACHINES["h800"], name="mine")


def test_a_whole_machine_can_be_written_down(written):
    values = {f.name: getattr(MACHINES["h100"], f.name) for f in fields(Machine) if f.name != "rates"}
    rates = {f.name: getattr(MACHINES["h100"].rates, f.name) for f in fields(Rates)}
    assert load_machine(written(values | {"rates": rates})) == MACHINES["h100"]


WRONG = {
    "no JSON": ("{", "cannot read the machine"),
    "no object": ([1], "a machine is a JSON object of name, memory, "),
    "a field": ({"nvlnk": 1e11}, "unknown field 'nvlnk'; did you mean nvlink"),
    "a rate": ({"rates": {"gem": 0.5}}, "rates: unknown field 'gem'; did you mean gemm"),
    "rates": ({"rates": 3}, "rates: must be a JSON object"),
    "likeness": ({"like": "h900"}, "like: no machine is named 'h900'; did you mean h"),
    "likeness of a kind": ({"like": ["h800"]}, "like: no machine is named"),
    "text for a number": ({"memory": "80 GB"}, "machine.memory is '80 GB': it must be a number"),
    "truth for a number": ({"nvlink": True}, "machine.nvlink is True: it must be a number"),
    "nothing for a number": ({"fp8": None}, "machine.fp8 is None: it must be a number"),
    "below 0": ({"network": -1}, "machine.network is -1: it must be a number, not below 0"),
    "infinite": ('{"bf16": Infinity}', "machine.bf16 is inf: it must be a number"),
    "no number": ('{"bf16": NaN}', "machine.bf16 is nan: it must be a number"),
    "0": ({"nvlink": 0}, "machine.nvlink is 0: it must be positive"),
    "no network": ({"network": 0}, "machine.network is 0: it must be positive"),
    "parts of GPUs": ({"gpus_per_node": 7.5}, "machine.gpus_per_node is 7.5: it must be a whole number"),
    "a number for text": ({"name": 5}, "machine.name is 5: it must be text"),
    "more than the peak": ({"rates": {"stream": 1.2}}, "machine.rates.stream is 1.2: .* at most 1"),
    "a rate of 0": ({"rates": {"gemm": 0}}, "machine.rates.gemm is 0: it must be positive"),
    "no SM left": ({"communication_sms": 132}, "machine.communication_sms is 132, all of the 132"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_by_file_and_field(written, content, message):
    path = written(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(path)}: .*{message}"):
        load_machine(path)


def test_a_missing_file_and_an_unknown_name(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot read the machine"):
        load_machine(str(tmp_path / "nowhere.json"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.json: cannot read the machine"):
        load_machine(str(tmp_path / "folder.json"))
    with pytest.raises(ConfigError, match=r"no machine is named 'h801'; did you mean h800.*\.json"):
        load_machine("h801")


def test_a_file_that_is_no_text(tmp_path):
    path = Path(tmp_path / "binary.json")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.json: cannot read the machine"):
        load_machine(str(path))


def test_a_machine_without_fp8_says_what_to_plan_with(written):
    with pytest.raises(ConfigError, match="old has no fp8: plan with precision bf16"):
        load_machine(written({"fp8": 0}, "old.json")).peak("fp8")
