"""The memory model: against real steps, against what autograd saves, and as a function."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lgcnet_fast.config import load_config
from lgcnet_fast.ops import upsample_cross_entropy
from lgcnet_fast.ops.lanes import LANES
from lgcnet_fast.space.genotype import load_genotype
from lgcnet_fast.space.sampling import probabilities
from lgcnet_fast.train import finetune as finetune_module
from lgcnet_fast.train import pretrain as pretrain_module
from lgcnet_fast.train.live_bytes import LiveBytes, rounded, scratch
from lgcnet_fast.train.memory import CUBLAS_WORKSPACE, step_memory
from tests.combinations import some_cases
from tests.train.test_pipeline import GENOTYPE, derived
from tests.train.test_search import SMALL_LGCNET, make_searcher

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CLASSES = 19
LGCNET = {"space": SMALL_LGCNET, "search__batch_size": 2, "latency__size": (97, 193)}


def real_step(run, stage):
    """The step of a stage and random batches for it."""
    sizes = {
        "search": (run.config.search.batch_size, *run.config.search.augmentation.crop),
        "finetune": (run.config.finetune.batch_size, *run.config.finetune.augmentation.crop),
        "pretrain": (run.config.pretrain.batch_size, *[run.config.pretrain.image_size] * 2),
    }
    count, height, width = sizes[stage]
    images = torch.randn(count, 3, height, width).to(memory_format=torch.channels_last)
    labels = torch.zeros(count, height, width, dtype=torch.long)
    if stage == "search":
        return make_searcher(run).step, (images, labels)
    if stage == "finetune":
        return finetune_module._trainer(run).step, (images, labels)
    return pretrain_module._trainer(run, CLASSES).step, (images, labels[:, 0, 0])


CASES = {
    "search fp32": ("search", {}),
    "search bf16": ("search", {"precision": "bf16"}),
    "search accumulate": ("search", {"search__accumulate": 2}),
    "search lgcnet fp32": ("search", LGCNET),
    "search lgcnet bf16": ("search", {**LGCNET, "precision": "bf16"}),
    "search target": ("search", {"search__latency_target_ms": 8.0}),
    "pretrain": ("pretrain", {}),
    "finetune": ("finetune", {"finetune__ema": 0.9, "finetune__class_weights": "inverse_log"}),
    "finetune fp16": ("finetune", {"precision": "fp16", "finetune__loss": "cross_entropy"}),
}


@pytest.mark.parametrize(("stage", "changes"), CASES.values(), ids=CASES)
def test_prediction_is_what_a_real_step_allocates(new_run, stage, changes):
    run = derived(new_run(**changes))
    predicted = step_memory(run.config, stage, CLASSES, run.precision, CPU, GENOTYPE)
    step, batch = real_step(run, stage)
    with LiveBytes() as live:
        step([batch] * getattr(run.config, stage).__dict__.get("accumulate", 1))
    assert predicted.activations + predicted.gradients == pytest.approx(live.peak, rel=0.03)


@some_cases("precision", ("fp32", "bf16"), 1)
def test_activations_are_those_that_autograd_saves(new_run, precision):
    crop = {"search__augmentation": {"crop": [129, 129]}}
    run = new_run(precision=precision, **LGCNET, **crop)
    predicted = step_memory(run.config, "search", CLASSES, precision, CPU)
    searcher = make_searcher(run)
    network, z = searcher.network.supernet, probabilities(searcher.network.arch())
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = rounded(storage.nbytes())
        return tensor

    images = torch.randn(2, 3, 129, 129).to(memory_format=torch.channels_last)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with searcher.precision.autocast():
            output = network(images, z)
        upsample_cross_entropy(output, torch.zeros(2, 129, 129, dtype=torch.long))
    assert 0.95 < predicted.activations / sum(saved.values()) < 1.15


def test_components_and_total(new_run):
    config = new_run(cuda_graph=True).config
    on_cpu = step_memory(config, "search", CLASSES, "fp32", CPU)
    on_gpu = step_memory(
        config.model_copy(update={"backend": "reference"}), "search", CLASSES, "fp32", GPU
    )
    images = 4 * 4 * 3 * 33 * 33
    labels = 8 * 4 * 33 * 33
    assert on_cpu.batch == rounded(images) + rounded(labels)
    # A CUDA graph reads a copy of the batch.
    assert on_gpu.batch == 2 * on_cpu.batch
    assert (on_cpu.workspace, on_gpu.workspace) == (0, CUBLAS_WORKSPACE)
    assert on_gpu.activations == on_cpu.activations
    fused = config.model_copy(update={"backend": "triton"})
    on_streams = step_memory(fused, "search", CLASSES, "fp32", GPU)
    assert on_streams.workspace == LANES * CUBLAS_WORKSPACE
    # SGD keeps one number a weight, Adam two.
    assert 0 < on_cpu.optimiser < 3 * on_cpu.parameters
    assert on_cpu.total == sum(
        (on_cpu.parameters, on_cpu.optimiser, on_cpu.batch, on_cpu.gradients, on_cpu.activations)
    )


def test_activations_grow_with_the_batch_and_shrink_with_precision(new_run):
    def activations(batch, precision):
        config = new_run(f"{batch}-{precision}", search__batch_size=batch).config
        return step_memory(config, "search", CLASSES, precision, CPU).activations

    assert activations(8, "fp32") == pytest.approx(2 * activations(4, "fp32"), rel=0.03)
    assert activations(8, "bf16") < 0.9 * activations(8, "fp32")


def test_accumulation_keeps_the_gradients_of_earlier_micro_batches(new_run):
    whole = step_memory(new_run("whole").config, "search", CLASSES, "fp32", CPU)
    parts = step_memory(new_run("p", search__accumulate=2).config, "search", CLASSES, "fp32", CPU)
    assert parts.gradients > whole.gradients
    assert parts.batch == 2 * whole.batch


def test_the_fused_backend_saves_less(new_run):
    """Counted without its GPU, from what its operations declare."""
    config = new_run(**LGCNET).config
    reference, fused = (
        step_memory(config.model_copy(update={"backend": backend}), "search", CLASSES, "bf16", GPU)
        for backend in ("reference", "triton")
    )
    assert fused.activations < 0.6 * reference.activations


def test_half_precision_of_the_cuda_backend_makes_branches_again(new_run, monkeypatch):
    crop = {"search__augmentation": {"crop": [129, 129]}}
    config = new_run(**LGCNET, **crop).config.model_copy(update={"backend": "cuda"})
    spared = step_memory(config, "search", CLASSES, "fp16", GPU)
    monkeypatch.setattr("lgcnet_fast.nn.candidates.spares", lambda x: False)
    kept = step_memory(config, "search", CLASSES, "fp16", GPU)
    assert spared.activations < 0.85 * kept.activations


def test_a_search_of_the_paper_fits_a_card_of_12_gb():
    """16 images of 769x769 in fp16: 11 GiB leave room for what the allocator adds."""
    config = load_config(preset="paper", overrides=("backend=cuda", "data.name=synthetic"))
    assert config.search.batch_size == 16 and config.search.augmentation.crop == (769, 769)
    assert step_memory(config, "search", CLASSES, "fp16", GPU).total < 9 * 2**30


@pytest.mark.parametrize("multiplied", [True, False])
def test_depthwise_maps_inside_a_fused_operation_count(multiplied):
    x, statistics = torch.empty(2, 8, 5, 7, dtype=torch.bfloat16), torch.empty(3, 2, 8)
    products = torch.empty(2, 4, 8) if multiplied else torch.empty(2, 0)
    weights = torch.empty(2, 3, 3, 8), products
    backward = torch.ops.lgcnet_fast.normalised_depthwise_backward.default
    arguments = ([x[None, :, :4]] * 2, [x, x], *weights, statistics, True, x.new_empty(0))
    assert scratch(backward, arguments) == multiplied * 2 * 2 * 8 * 5 * 7 * 2
    assert scratch(torch.ops.aten.add.Tensor, (x, x)) == 0


@pytest.mark.parametrize(
    ("dtype", "backend", "channels"),
    [
        (torch.float32, "triton", 11),
        (torch.float32, "cuda", 3),  # resized
        (torch.bfloat16, "cuda", 11),
        (torch.bfloat16, "triton", 0),
    ],
)
def test_concatenations_inside_a_fused_operation_count(dtype, backend, channels):
    x, y = torch.empty(2, 8, 5, 7, dtype=dtype), torch.empty(2, 3, 2, 4, dtype=dtype)
    arguments = ([x, y], [5, 7], torch.empty(4, 11, 1, 1), True, backend)
    expected = 2 * channels * 5 * 7 * x.element_size()
    registered = torch.ops.lgcnet_fast
    assert scratch(registered.concat_upsample_pointwise.default, arguments) == expected
    backward = registered.concat_upsample_pointwise_backward.default
    assert scratch(backward, (x[:, :4], *arguments)) == 2 * expected


def test_a_derived_network_is_counted_by_its_genotype(new_run):
    config = new_run(space={"name": "lgcnet"}, finetune__batch_size=1).config
    memory = step_memory(config, "finetune", CLASSES, "fp32", CPU, load_genotype("reference"))
    assert memory.parameters == pytest.approx(4 * 2.09e6, rel=0.1)
