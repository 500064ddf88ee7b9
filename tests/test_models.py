"""replace_ and fuse_ on the architectures people have, against the untouched twin.

Three optimizer steps, then eval. In fp64, so that a wrong formula cannot hide in rounding: only the
order of sums may differ. Dropout stays on, under the same seed: the surgery must not disturb the
random numbers either.
"""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from fastnorm import dispatch
from fastnorm.fuse import fuse_
from fastnorm.modules import layer_norm, weight_norm
from fastnorm.replace import replace_, restore_
from tests.twins import assert_untouched, snapshot

transformers = pytest.importorskip("transformers")


def image(size=32):
    return {"pixel_values": torch.randn(2, 3, size, size, dtype=torch.float64)}


def tokens():
    return {"input_ids": torch.randint(0, 50, (2, 7))}


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[2, 2],
        layer_type="basic",
        downsample_in_first_stage=True,
    )
    return transformers.ResNetModel(config), image()


def resnet_bottleneck():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])
    return transformers.ResNetModel(config), image()


def efficientnet():
    config = transformers.EfficientNetConfig(
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 40],
        depthwise_padding=[],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 2],
        expand_ratios=[1, 6, 6],
        hidden_dim=320,
    )
    return transformers.EfficientNetModel(config), image()


def convnext():
    config = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
    return transformers.ConvNextModel(config), image()


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=0.1,
    )
    return transformers.ViTModel(config), image()


def bert():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return transformers.BertModel(config), tokens()


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2Model(config), tokens()


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        feat_extract_norm="layer",
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
    )
    return transformers.Wav2Vec2Model(config), {
        "input_values": torch.randn(2, 400, dtype=torch.float64)
    }


# model -> how many modules replace_ changes, and how many norms fuse_ folds something into
MODELS = {
    resnet: (11, 5),
    resnet_bottleneck: (9, 5),
    efficientnet: (20, 6),
    convnext: (7, 0),
    vit: (7, 2),
    bert: (7, 4),
    gpt2: (7, 2),
    wav2vec2: (14, 4),
}


def build(make):
    torch.manual_seed(0)
    model, inputs = make()
    return model.double().train(), inputs


def outputs_of(model, inputs):
    output = model(**inputs)
    return output.last_hidden_state


def three_steps(model, inputs, optimizer):
    """Losses, and the gradients of the last step."""
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        y = outputs_of(model, inputs)
        loss = (
            y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        ).mean() + y.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), {name: p.grad for name, p in model.named_parameters()}


def assert_close(ours, theirs, name):
    if theirs is None or ours is None:
        assert ours is theirs, name
        return
    torch.testing.assert_close(
        ours, theirs, rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("fused", [False, True], ids=["replaced", "fused"])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_three_steps_give_the_numbers_of_the_untouched_model(make, fused, backend):
    model, inputs = build(make)
    twin, before = copy.deepcopy(model), snapshot(model)
    # built before the surgery: its parameters have to stay the model's
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    report = replace_(model)
    assert report.changed == MODELS[make][0], report
    if fused:
        folded = [row for row in fuse_(model) if not row.why_skipped and "(" in row.now]
        assert len(folded) == MODELS[make][1]
    assert list(model.state_dict()) == list(twin.state_dict())

    with dispatch.backend(backend):
        losses, gradients = three_steps(model, inputs, optimizer)
    reference = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    expected, expected_gradients = three_steps(twin, inputs, reference)
    assert_close(losses, expected, "loss")
    assert not torch.equal(expected[0], expected[2])
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], f"gradient of {name}")
    for name, value in model.state_dict().items():
        assert_close(value, twin.state_dict()[name], name)

    with torch.no_grad(), dispatch.backend(backend):
        ours = outputs_of(model.eval(), inputs)
    with torch.no_grad():
        assert_close(ours, outputs_of(twin.eval(), inputs), "eval output")

    model.train()
    restore_(model)
    assert_untouched(model, before)


def test_wav2vec2_has_its_weight_norm_on_dim_2():
    model, _ = build(wav2vec2)
    replace_(model)
    found = [module for module in model.modules() if type(module) is weight_norm.WeightNorm]
    assert [module.dim for module in found] == [2]


def test_a_fused_model_that_is_checkpointed():
    """Layers of transformers run the class's own forward then, which finds the same norms."""
    model, inputs = build(vit)
    twin = copy.deepcopy(model)
    assert fuse_(model).changed == 4
    layer = model.layers[0]
    for net in (model, twin):
        new = getattr(net, "activation_checkpointing_enable", None)
        (new or net.gradient_checkpointing_enable)()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (model, twin)]
    runs = [three_steps(net, inputs, by) for net, by in zip((model, twin), optimizers, strict=True)]
    assert torch.equal(runs[0][0], runs[1][0])
    calls = []
    hook = layer.mlp.register_forward_hook(lambda *arguments: calls.append(1))
    outputs_of(model, inputs).sum().backward()
    assert len(calls) == 2  # computed again in backward
    hook.remove()
    model.eval(), twin.eval()
    assert layer.forward.checkpointed
    assert torch.equal(outputs_of(model, inputs), outputs_of(twin, inputs))


def test_no_activation_is_folded_where_a_layer_can_be_checkpointed():
    layers = pytest.importorskip("transformers.modeling_layers")

    class Block(layers.GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.norm, self.act = torch.nn.LayerNorm(4), torch.nn.GELU()

        def forward(self, x):
            return self.act(self.norm(x))

    if not hasattr(Block.forward, "__wrapped__"):
        pytest.skip("this version of transformers checkpoints outside of forward")
    (row,) = fuse_(Block())
    assert row.why_skipped.startswith("Block: its forward can be checkpointed, and would apply")


def test_under_auto_on_a_cpu_the_numbers_are_torchs_to_the_bit():
    model, inputs = build(bert)
    twin = copy.deepcopy(model)
    replace_(model)
    fuse_(model)
    assert any(type(module) is layer_norm.LayerNorm for module in model.modules())
    torch.manual_seed(0)
    ours = outputs_of(model, inputs)
    torch.manual_seed(0)
    assert torch.equal(ours, outputs_of(twin, inputs))
