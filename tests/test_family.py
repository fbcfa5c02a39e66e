"""The tiny models differ in the expansion ratio alone, and a seed is all that their first weights need."""

import pytest
import torch

from ffnprobe.family import D_MODEL, LAYERS, MEMBERS, digest

PLAIN = [member for member in MEMBERS.values() if not member.gated]
GATED = [member for member in MEMBERS.values() if member.gated]


def test_a_name_says_the_expansion():
    widths = {name: member.d_mlp for name, member in MEMBERS.items()}
    plain = {"tiny-x0.5": 64, "tiny-x1": 128, "tiny-x2": 256, "tiny-x4": 512, "tiny-x8": 1024, "tiny-x16": 2048}
    assert widths == plain | {"tiny-swiglu-x1": 128, "tiny-swiglu-x2.67": 341, "tiny-swiglu-x8": 1024}
    for name, member in MEMBERS.items():
        assert float(name.rpartition("x")[2]) == pytest.approx(member.expansion, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "key"), [(PLAIN, "n_inner"), (GATED, "intermediate_size")], ids=["gpt2", "llama"]
)
def test_within_a_kind_the_width_alone_differs(kind, key):
    configs = [member.config.to_dict() for member in kind]
    assert [config.pop(key) for config in configs] == [member.d_mlp for member in kind]
    assert all(config == configs[0] for config in configs)


@pytest.mark.parametrize(
    ("kind", "a_neuron"), [(PLAIN, 2 * D_MODEL + 1), (GATED, 3 * D_MODEL)], ids=["gpt2", "llama"]
)
def test_a_wider_member_has_the_parameters_of_its_neurons_more(kind, a_neuron):
    narrow, wide = (sum(p.numel() for p in member.at_step_0(0).parameters()) for member in (kind[0], kind[1]))
    assert wide - narrow == LAYERS * (kind[1].d_mlp - kind[0].d_mlp) * a_neuron


@pytest.mark.parametrize("name", ["tiny-x1", "tiny-swiglu-x1"])
def test_the_first_weights_come_from_the_seed_alone(name):
    found = []
    for elsewhere in (1, 2):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        found.append(digest(MEMBERS[name].at_step_0(3).state_dict()))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1] != digest(MEMBERS[name].at_step_0(4).state_dict())


def test_a_digest_is_of_names_types_shapes_and_numbers_in_any_order():
    state = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(3)}
    assert digest(dict(reversed(state.items()))) == digest(state)
    strided = torch.tensor([[1.0, 9.0, 2.0, 9.0]])[:, ::2]
    assert digest(state | {"a": strided}) == digest(state)
    others = [{"a": state["b"], "b": state["a"]}, {"a": state["a"], "c": state["b"]}, {"a": state["a"]}]
    others += [state | {"a": a} for a in (state["a"].T, state["a"].int(), state["a"] + 1e-6)]
    assert len({digest(other) for other in [state, *others]}) == 7
