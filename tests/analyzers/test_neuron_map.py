import pytest
import torch

from ffnprobe import neuron_map
from ffnprobe.analyzers.neuron_map import NeuronMap, by_size, coordinates
from ffnprobe.errors import InputError
from ffnprobe.stream import capture

FEW = {"clusters": 4, "seeds": 2, "permutations": 3}


def test_coordinates_give_back_distances_in_the_plane():
    points = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = points - points.mean(dim=0)
    found, share = coordinates(points @ points.T)
    assert share == pytest.approx(1)
    assert torch.allclose(torch.cdist(found.double(), found.double()), torch.cdist(points, points), atol=1e-4)
    spread = found.var(dim=0)
    assert spread[0] > spread[1] and (found.gather(0, found.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_the_share_of_independent_neurons_is_that_of_two_of_many():
    assert coordinates(torch.eye(50))[1] == pytest.approx(2 / 49)


def test_clusters_are_numbered_from_the_largest_on():
    labels = torch.tensor([3, 1, 1, 3, 1, 0])
    assert by_size(labels).tolist() == [1, 0, 0, 1, 0, 2]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_profiles_are_mean_correlations_in_the_other_half(architecture, model_of, tokens, tmp_path):
    model = model_of(architecture)
    text = tokens(model)
    found = neuron_map(model, text, layers=[1], **FEW)
    seen = [batch[1] for batch in capture(model, text, ["post"], layers=[1])]
    hidden = torch.cat([one.sites["post"][one.kept] for one in seen]).abs().double()
    odd = text.document.flatten()[torch.cat([one.at[one.kept] for one in seen])] % 2 == 1
    correlation = hidden[odd].T.corrcoef()
    labels = torch.tensor([row.cluster for row in found.rows])
    assert labels.bincount().tolist() == sorted(labels.bincount().tolist(), reverse=True)
    for row in found.rows:
        for cluster, mean in enumerate(row.profile):
            others = (labels == cluster) & (torch.arange(len(labels)) != row.neuron)
            assert mean == pytest.approx(
                float(correlation[row.neuron, others].nan_to_num().sum() / max(1, others.sum())), abs=1e-4
            )
    again = NeuronMap.load(found.save(tmp_path / "t.parquet"))
    assert list(again.rows) == list(found.rows) and "Layer 1:" in again.findings()[0]
    titles = [axes.get_title() for axes in again.plot().axes]
    assert titles[:2] == ["Co-activation, by cluster", "Neurons, by principal coordinates"]


def test_the_middle_layer_is_mapped_and_a_part_of_its_neurons(llama, tokens):
    found = neuron_map(llama, tokens(llama), neurons=10, **FEW)
    assert {row.layer for row in found.rows} == {1} and len({row.neuron for row in found.rows}) == 10
    assert max(row.neuron for row in found.rows) > 10


def test_layers_that_do_not_fit_are_said(llama, tokens):
    with pytest.raises(InputError, match="layer 1 does not fit into a budget"):
        neuron_map(llama, tokens(llama), layers=[0, 1, 2], budget=90_000, **FEW)
