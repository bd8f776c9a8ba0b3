"""Fields of a machine's file that are of the wrong kind or out of bounds: each is named with its file."""

import json

import pytest

from infra.cluster.machines import load_machine
from infra.errors import ConfigError

WRONG = [
    ({"like": ["h100"]}, "like: no machine is named"),
    ({"like": 5}, "like: no machine is named"),
    ({"gpus_per_node": 8.5}, "machine.gpus_per_node is 8.5: it must be a whole number, such as 8"),
    ({"multiprocessors": 130.5}, "machine.multiprocessors is 130.5: it must be a whole number"),
    ({"communication_sms": 0.5}, "machine.communication_sms is 0.5: it must be a whole number"),
    ({"name": 5}, "machine.name is 5: it must be text"),
    ({"source": None}, "machine.source is None: it must be text"),
    ({"memory": "80 GB"}, "machine.memory is '80 GB': it must be a number"),
    ({"memory": True}, "machine.memory is True: it must be a number"),
    ({"network": 0}, "machine.network is 0: it must be positive"),
    ({"rates": {"gemm": 1.5}}, "machine.rates.gemm is 1.5: a share of the peak is at most 1"),
    ({"rates": {"gemm": "x"}}, "machine.rates.gemm is 'x': it must be a number"),
    ({"rates": 5}, "rates: must be a JSON object"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_a_field_of_the_wrong_kind_is_named(tmp_path, given, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(given))
    with pytest.raises(ConfigError) as error:
        load_machine(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_what_is_not_said_is_taken_from_the_machine_it_is_like(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"like": "h200", "fp8": 0, "nvlink_latency": 0, "rates": {"gemm": 0.5}}))
    found, h200 = load_machine(str(path)), load_machine("h200")
    assert (found.name, found.fp8, found.nvlink_latency, found.rates.gemm) == ("mine", 0, 0, 0.5)
    assert (found.memory, found.rates.wgrad) == (h200.memory, h200.rates.wgrad)
