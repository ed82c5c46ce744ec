from typing import get_args

import pytest

from moe.bench.contestants import Bench, Package, contestants, entries
from moe.config import ExpertBackend

BENCHES = get_args(Bench)


@pytest.mark.parametrize("bench", BENCHES)
def test_every_back_end_of_ours_takes_part(bench):
    names = [contestant.name for contestant in contestants(bench) if contestant.ours]
    for backend in get_args(ExpertBackend):
        assert (f"ours {backend}" in names) == (backend != "auto")


@pytest.mark.parametrize("bench", BENCHES)
def test_names_are_distinct_and_none_has_the_comma_that_separates_them(bench):
    names = [contestant.name for contestant in contestants(bench)]
    assert len(names) == len(set(names))
    assert not any("," in name for name in names)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shares_are_of_one_bound(device):
    for bench, bounds in (("layer", ["dense"]), ("step", ["dense twin compiled"]), ("decode", [])):
        here = [contestant for contestant in contestants(bench) if device in contestant.devices]
        assert [contestant.name for contestant in here if contestant.bound] == bounds


def test_on_a_cpu_peers_run_under_both_settings_and_ours_under_its_own():
    both = {entry.name: entry for entry in entries("decode", "cpu", ["users", "ours"])}
    assert both["mixtral grouped_mm"].settings == "users"
    assert both["mixtral grouped_mm + our settings"].settings == "ours"
    assert both["ours segments"].settings == "ours"
    assert "ours segments + our settings" not in both
    assert "mixtral grouped_mm" not in {entry.name for entry in entries("decode", "cpu", ["ours"])}


def test_on_cuda_the_settings_of_a_process_are_no_matter():
    names = [entry.name for entry in entries("layer", "cuda", ["users", "ours"])]
    assert "sonic-moe" in names
    assert not any("settings" in name for name in names)
    assert "sonic-moe" not in [entry.name for entry in entries("layer", "cpu", ["users"])]


def test_the_peers_that_drop_and_those_that_round_are_marked():
    step = {contestant.name: contestant for contestant in contestants("step")}
    assert [name for name in step if step[name].drops] == ["mixture-of-experts", "st-moe-pytorch"]
    assert [name for name in step if step[name].low_precision] == ["torchtitan's layer"]


def test_a_package_is_installed_if_it_can_be_imported():
    assert Package("torch", "torch").installed
    assert Package("torch", "torch").version
    assert not Package("no_such_package", "no-such-package").installed
    assert Package("no_such_package", "no-such-package").version == ""
