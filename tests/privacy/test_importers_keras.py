"""Keras models as networks of the language: each layer with its options, whole models, and every refusal by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.wire.columns import CategoryColumn
from cloister_privacy.architecture import Network
from cloister_privacy.architecture.importers import Imported, ModelNotSupported, from_keras
from cloister_privacy.training.examples import synthetic
from cloister_privacy.training.guard import GUARD_EXAMPLES, guard, require_exact_clipping
from importing import architecture_of, examples_of, network_of, require_equal

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="keras is not installed: pip install 'cloister[keras]'")
L, ops = keras.layers, keras.ops

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}:keras") for kind in ("UserWarning", "DeprecationWarning")]
few = settings(max_examples=6, deadline=None)


def same(model: Any, *, width: int = 3, last: Any = None, input_shape: Any = None) -> Imported:
    """Import a model, and require that the network of it computes the same. `last` is what the language leaves out at the end."""
    for variable in model.trainable_variables:  # biases begin at 0, which would hide that they are lost
        if "bias" in variable.path or "beta" in variable.path:
            variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    imported = from_keras(model, input_shape)
    network = network_of(imported, width=width)
    values = examples_of(network)
    given = [each.numpy() for each in values.values()]
    expected = ops.convert_to_numpy(model(given if len(given) > 1 else given[0], training=False))
    if last is None:
        require_equal(network, values, torch.tensor(expected))
    else:
        with torch.no_grad():
            ours = last(network(values))
        np.testing.assert_allclose(ours.numpy(), expected.reshape(ours.shape), atol=1e-4)
    return imported


def ended(shape: tuple[int, ...], body: Callable[[Any], Any] | list[Any]) -> Any:
    """A functional model: a body, and a Dense layer on all that it gives."""
    x = inputs = keras.Input(shape)
    for each in body if isinstance(body, list) else [body]:
        x = each(x)
    x = x if len(x.shape) == 2 else L.Flatten()(x)
    return keras.Model(inputs, L.Dense(3)(x))


def kinds(imported: Imported) -> list[str]:
    return [layer.type for layer in imported.layers]


class Seed(keras.Model):  # type: ignore[misc]
    """As a user of Keras wrote it: pools made in `call`, and a softmax under a loss that expects logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = L.Conv2D(32, (3, 3), activation="relu")
        self.conv2 = L.Conv2D(64, (3, 3), activation="relu")
        self.dense1 = L.Dense(128, activation="relu")
        self.dense2 = L.Dense(10, activation="softmax")

    def call(self, x: Any) -> Any:
        x = L.MaxPooling2D((2, 2))(self.conv1(x))
        x = L.MaxPooling2D((2, 2))(self.conv2(x))
        return self.dense2(self.dense1(L.Flatten()(x)))


@pytest.fixture(scope="module")
def seed() -> Any:
    model = Seed()
    model.compile(
        optimizer=keras.optimizers.SGD(0.01), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def test_the_seed_model_imports_as_it_stands(seed: Any) -> None:
    imported = same(seed, width=10, last=lambda logits: logits.softmax(1), input_shape=(28, 28, 1))
    assert kinds(imported) == [
        *("permute", "conv2d", "relu", "max_pool", "conv2d", "relu", "max_pool"),
        *("permute", "flatten", "linear", "relu", "linear"),
    ]
    assert imported.inputs == {"x": (28, 28, 1)}
    assert any("from_logits=True and ends in probabilities" in each for each in imported.warnings)
    assert any("the last softmax is left out" in each for each in imported.warnings)


def test_an_imported_model_can_be_trained_privately(seed: Any) -> None:
    imported = from_keras(seed, (28, 28, 1))
    network = network_of(imported, width=10)
    batch = synthetic(architecture_of(imported, width=10), GUARD_EXAMPLES, device="cpu")
    guard(network)
    require_exact_clipping(network, lambda net, rows: net.losses(net(rows[0]), rows[1]), batch)  # type: ignore[operator]


def test_a_subclassed_model_needs_a_shape_until_it_was_called() -> None:
    model = Seed()
    with pytest.raises(
        ModelNotSupported, match=r"has no inputs yet; give the shape of one example: from_keras\(model, input_shape"
    ):
        from_keras(model)
    model(np.zeros((2, 12, 12, 1), np.float32))
    assert from_keras(model).inputs == {"x": (12, 12, 1)}


@few
@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, (3, 1)]),
    st.sampled_from(["valid", "same"]),
    st.booleans(),
    st.sampled_from([None, "relu", "tanh"]),
)
def test_a_convolution_over_an_image_is_the_same(
    filters: int, kernel: Any, padding: str, use_bias: bool, activation: str | None
) -> None:
    kernel = 3 if kernel == 2 and padding == "same" else kernel
    layer = L.Conv2D(2 * filters, kernel, padding=padding, groups=2, use_bias=use_bias, activation=activation)
    imported = same(ended((7, 6, 4), layer))
    assert kinds(imported)[0] == "permute" and kinds(imported).count("permute") == 2


@pytest.mark.parametrize(
    ("shape", "body"),
    [
        ((9, 4), [L.Conv1D(3, 3, strides=2, activation="gelu")]),
        ((9, 4), [L.Conv1D(3, 3, padding="same", dilation_rate=2)]),
        ((8, 8, 2), [L.DepthwiseConv2D(3, depth_multiplier=2)]),
        ((8, 8, 2), [L.SeparableConv2D(3, 3, activation="silu")]),
        ((8, 8, 2), [L.ZeroPadding2D(1), L.Conv2D(3, 3, strides=2)]),
        ((8, 8, 2), [L.Conv2D(3, 3), L.MaxPooling2D(3, strides=2), L.Conv2D(2, 1)]),
        ((8, 8, 2), [L.AveragePooling2D(2), L.MaxPooling2D(2, padding="same")]),
        ((8, 2), [L.MaxPooling1D(2), L.AveragePooling1D(2, strides=1)]),
        ((8, 8, 2), [L.Conv2D(4, 3), L.GlobalAveragePooling2D()]),
        ((8, 8, 2), [L.Conv2D(4, 3), L.GlobalMaxPooling2D(keepdims=True)]),
        ((8, 4), [L.GlobalMaxPooling1D()]),
        ((8, 4), [L.GlobalAveragePooling1D()]),
        ((6,), [L.Dense(5, activation="selu"), L.Dense(4, activation="elu", use_bias=False)]),
        ((5, 6), [L.Dense(4, activation="leaky_relu"), L.TimeDistributed(L.Dense(2, activation="tanh"))]),
        ((3, 5, 6), [L.Dense(4)]),
        ((6,), [L.Activation("sigmoid"), L.ReLU(), L.LeakyReLU(0.1), L.ELU(0.5), L.Softmax()]),
        ((4, 6), [L.ReLU(negative_slope=0.1), L.Softmax(axis=1), L.Activation("softmax")]),
        ((4, 6), [L.Dropout(0.5), L.SpatialDropout1D(0.2), L.GaussianNoise(0.1), L.Identity()]),
        ((4, 6), [L.LayerNormalization(), L.RMSNormalization()]),
        ((4, 6), [L.LayerNormalization(axis=[1, 2], epsilon=1e-5), L.LayerNormalization(center=False)]),
        ((8, 8, 4), [L.Conv2D(4, 3), L.GroupNormalization(2), L.LayerNormalization(), L.Conv2D(2, 3)]),
        ((8, 4), [L.GroupNormalization(-1)]),
        ((4, 6), [L.Reshape((6, 4)), L.Permute((2, 1)), L.Flatten()]),
        ((8, 8, 3), [L.Rescaling(1 / 127.5, offset=-1), L.Conv2D(2, 3)]),
        ((8, 8, 3), [L.Rescaling([0.1, 0.2, 0.3], offset=[1.0, 2.0, 3.0])]),
        ((6,), [L.Normalization(mean=[1.0] * 6, variance=[4.0, 1, 1, 2, 3, 4])]),
        ((4, 6), [L.LSTM(3)]),
        ((4, 6), [L.LSTM(3, return_sequences=True, use_bias=False)]),
        ((4, 6), [L.GRU(3, return_sequences=True), L.GRU(2)]),
        ((4, 6), [L.SimpleRNN(3, activation="relu"), L.Dense(2)]),
        ((4, 6), [L.Bidirectional(L.LSTM(3, return_sequences=True)), L.Bidirectional(L.GRU(3))]),
        ((4, 6), [L.Lambda(lambda x: x * 2 + 1), keras.Sequential([L.Dense(4, "relu"), L.Dense(2)])]),
        ((4, 6), [lambda x: ops.relu(x) * 2 - x / 3 + 1, lambda x: ops.transpose(x, (0, 2, 1))]),
        ((4, 6), [lambda x: ops.concatenate([x[:, :2], ops.square(x)[:, 1:]], axis=1)]),
        ((4, 6), [lambda x: ops.mean(x, axis=1, keepdims=True) * x, lambda x: ops.max(x, axis=-1)]),
        ((4, 6), [lambda x: ops.reshape(x, (-1, 3, 8)), lambda x: x[:, -1], lambda x: -ops.expand_dims(x, 1)]),
    ],
    ids=lambda given: (
        "-".join(getattr(each, "name", "ops") for each in given) if isinstance(given, list) else str(given)
    ),
)
def test_a_layer_is_the_same(shape: tuple[int, ...], body: list[Any]) -> None:
    same(ended(shape, body))


@pytest.mark.parametrize("merge", [L.Add, L.Subtract, L.Multiply, L.Average, L.Concatenate])
def test_a_merge_of_branches_is_the_same(merge: Any) -> None:
    def body(x: Any) -> Any:
        y = L.Conv2D(3, 3, padding="same", activation="relu")(x)
        return merge()([x, y])

    same(ended((6, 6, 3), body))


def test_a_residual_network_of_images_stays_channels_first_between_its_layers() -> None:
    def body(x: Any) -> Any:
        x = L.Conv2D(4, 3, padding="same")(x)
        for _ in range(2):
            y = L.GroupNormalization(2)(L.Conv2D(4, 3, padding="same", activation="relu")(x))
            gate = L.Dense(4, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(y))
            x = L.Add()([x, L.Multiply()([y, gate])])
        return L.GlobalAveragePooling2D()(x)

    imported = same(ended((8, 8, 3), body))
    assert [layer.dims for layer in imported.layers if layer.type == "permute"] == [(2, 0, 1)]


def test_a_model_that_was_built_by_a_batch_takes_any_number_of_examples() -> None:
    model = keras.Sequential([L.Flatten(), L.Dense(3)])
    model(np.zeros((1, 2, 2)))
    assert same(model).inputs == {"inputs": (2, 2)}


def test_one_index_in_a_sequence_of_one_can_be_a_category() -> None:
    user, item = keras.Input((1,), name="user"), keras.Input((1,), name="item")
    x = L.Multiply()([L.Embedding(300, 4)(user), L.Embedding(300, 4)(item)])
    model = keras.Model([user, item], L.Dense(3)(L.Flatten()(x)))
    imported = same(model)  # as texts of one byte
    columns = CategoryColumn(values=tuple(f"c{index}" for index in range(300)))
    architecture = architecture_of(imported, width=3).model_copy(update={"inputs": {"user": columns, "item": columns}})
    network = Network(architecture)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in imported.weights.items()})
    tokens = np.arange(5)
    expected = torch.tensor(ops.convert_to_numpy(model([tokens[:, None], tokens[:, None]])))
    require_equal(network, {"user": torch.from_numpy(tokens), "item": torch.from_numpy(tokens)}, expected)


def test_two_inputs_joined_are_columns_by_their_names() -> None:
    image, facts = keras.Input((8, 8, 3), name="image"), keras.Input((4,), name="facts")
    x = L.Concatenate()([L.Flatten()(L.Conv2D(2, 3)(image)), L.Dense(3, "relu")(facts)])
    imported = same(keras.Model([image, facts], L.Dense(1)(x)), width=1)
    assert imported.inputs == {"image": (8, 8, 3), "facts": (4,)}


class Places(L.Layer):  # type: ignore[misc]
    """Words and places, as in Keras' own examples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = L.Embedding(257, 8), L.Embedding(20, 8)

    def call(self, x: Any) -> Any:
        return self.words(x) + self.places(ops.arange(0, ops.shape(x)[-1]))


class Block(L.Layer):  # type: ignore[misc]
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention, self.options = L.MultiHeadAttention(2, 4), options
        self.norm1, self.norm2 = L.LayerNormalization(epsilon=1e-6), L.LayerNormalization(epsilon=1e-6)
        self.feed = keras.Sequential([L.Dense(16, activation="gelu"), L.Dense(8)])

    def call(self, x: Any) -> Any:
        x = self.norm1(x + self.attention(x, x, **self.options))
        return self.norm2(x + self.feed(x))


@pytest.mark.parametrize("options", [{}, {"use_causal_mask": True}])
def test_a_transformer_of_layers_of_ones_own_is_the_same(options: dict[str, Any]) -> None:
    imported = same(ended((6,), [Places(), Block(**options), L.GlobalAveragePooling1D()]))
    assert [layer.causal for layer in imported.layers if layer.type == "multihead_attention"] == [bool(options)]
    assert "positional_embedding" in kinds(imported)


@pytest.mark.parametrize(
    "body",
    [
        [L.Embedding(257, 6), L.LSTM(4)],
        [L.Embedding(257, 6, mask_zero=True), L.LSTM(4)],
        [L.Embedding(257, 6, mask_zero=True), L.Dropout(0.1), L.GRU(4, return_sequences=True), L.GRU(3)],
        [L.Embedding(257, 6, mask_zero=True), L.Dense(4), L.GlobalAveragePooling1D()],
    ],
    ids=["plain", "masked", "masked twice", "masked mean"],
)
def test_a_text_model_is_the_same_and_skips_what_is_not_there_as_keras_does(body: list[Any]) -> None:
    imported = same(ended((7,), body))
    masked = [layer for layer in imported.layers if layer.type == "sequence_pool" and len(layer.reads or ()) == 2]
    assert bool(masked) == body[0].mask_zero


def test_attention_over_masked_words_reads_the_tokens() -> None:
    words = keras.Input((7,), name="words")
    x = L.Embedding(257, 8, mask_zero=True)(words)
    x = L.LayerNormalization()(L.Add()([x, L.MultiHeadAttention(2, 4)(x, x)]))
    imported = same(keras.Model(words, L.Dense(3)(L.GlobalAveragePooling1D()(x))))
    [attention] = [layer for layer in imported.layers if layer.type == "multihead_attention"]
    assert attention.reads is not None and attention.reads[1] == "words"


class Weights(L.Layer):  # type: ignore[misc]
    def build(self, shape: Any) -> None:
        self.matrix = self.add_weight(shape=(shape[-1], 5), name="matrix")
        self.bias = self.add_weight(shape=(5,), name="bias", initializer="normal")
        self.scale = self.add_weight(shape=(5,), name="scale", initializer="normal")

    def call(self, x: Any) -> Any:
        return ops.tanh(ops.matmul(x, self.matrix) + self.bias) * self.scale


def test_weights_of_a_layer_of_ones_own_are_weights_of_layers() -> None:
    imported = same(ended((4, 6), Weights()))
    assert kinds(imported)[:2] == ["linear", "tanh"]
    assert imported.layers[0].bias and imported.layers[0].in_features == 6


def test_a_sigmoid_before_a_loss_of_numbers_stays_and_before_another_goes() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(1, activation="sigmoid")])
    assert kinds(same(model, width=1, last=torch.sigmoid)) == ["linear"]
    model.compile(loss="mse")
    assert kinds(from_keras(model)) == ["linear", "sigmoid"]


def test_logits_under_a_loss_that_expects_probabilities_are_told() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    model.compile(loss="sparse_categorical_crossentropy")
    assert any("ends in logits" in each for each in from_keras(model).warnings)


def test_a_layer_that_is_not_trained_is_frozen() -> None:
    model = keras.Sequential([keras.Input((4,)), L.Dense(4), L.Dense(3)])
    model.layers[0].trainable = False
    assert [layer.frozen for layer in from_keras(model).layers] == [True, False]


def shared(x: Any) -> Any:
    layer = L.Dense(6)
    return layer(layer(x))


def elsewhere(x: Any) -> Any:
    x, y = L.Dense(4)(x), L.Dense(4)(x)
    return L.MultiHeadAttention(2, 2)(x, y)


GRID, LINE, VECTOR = (8, 8, 4), (5, 6), (6,)
REFUSED: list[tuple[tuple[int, ...], Any, str]] = [
    (
        GRID,
        L.BatchNormalization,
        r"BatchNormalization\): normalises over the examples.*use GroupNormalization",
    ),
    (GRID, lambda: L.Conv2D(3, 4, padding="same"), "take an odd kernel"),
    (GRID, lambda: L.Conv2D(3, 3, strides=2, padding="same"), "padding 'same' with strides"),
    (LINE, lambda: L.Conv1D(3, 3, padding="causal"), "padding 'causal'"),
    (GRID, lambda: L.Conv2DTranspose(3, 3), "Conv2DTranspose has no form"),
    (GRID, lambda: L.MaxPooling2D(3, padding="same"), "'same' that pads"),
    (GRID, L.UpSampling2D, "UpSampling2D has no form"),
    (VECTOR, L.PReLU, "use LeakyReLU"),
    (VECTOR, lambda: L.ReLU(max_value=6.0), "max_value"),
    (VECTOR, lambda: L.Dense(3, activation="softplus"), "activation softplus; the language has"),
    (VECTOR, lambda: L.Dense(3, activation=lambda x: x), "not Keras' own"),
    (LINE, lambda: L.LayerNormalization(axis=1), "axis=-1"),
    (LINE, lambda: L.LSTM(3, activation="relu"), "the activation relu: take tanh"),
    (LINE, lambda: L.GRU(3, reset_after=False), "reset_after=True"),
    (LINE, lambda: L.LSTM(3, go_backwards=True), "use Bidirectional"),
    (LINE, lambda: L.Bidirectional(L.LSTM(3), merge_mode="sum"), "take 'concat'"),
    (LINE, lambda: lambda x: L.MultiHeadAttention(2, 6)(x, x), r"let num_heads \* key_dim be 6"),
    (LINE, lambda: elsewhere, "self-attention"),
    (LINE, lambda: lambda x: L.LSTM(3, return_state=True)(x)[2], "the states of a recurrent layer|one output|no value"),
    (VECTOR, lambda: shared, "shares dense.*/kernel with dense"),
    (VECTOR, lambda: L.Dense(3, dtype="float64"), "policy float32"),
    (VECTOR, lambda: L.Lambda(lambda x: ops.cumsum(x, axis=1)), r"cumsum.*\(Cumsum\): Cumsum has no form"),
    (VECTOR, lambda: lambda x: x / ops.exp(x), "Exp has no form"),
    (VECTOR, lambda: lambda x: x - ops.mean(x, axis=0), "across the examples|keep the examples"),
    (LINE, lambda: lambda x: L.Dot(axes=2)([x, x]), "use Multiply and a Dense layer"),
    (LINE, L.Masking, "use an Embedding with mask_zero"),
    (VECTOR, lambda: L.RepeatVector(3), "RepeatVector has no form"),
    ((6,), lambda: [L.Embedding(257, 4, mask_zero=True), L.Bidirectional(L.LSTM(2))], "without mask_zero"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_the_language_cannot_say_is_refused_by_name_and_with_the_cure(number: int) -> None:
    shape, make, told = REFUSED[number]
    with pytest.raises(ModelNotSupported, match=told):
        from_keras(ended(shape, make()))


def test_a_refusal_lists_every_layer_that_cannot_be_mapped() -> None:
    body = [
        L.Conv2D(3, 4, padding="same", name="one"),
        L.BatchNormalization(name="two"),
        L.Dense(3),
        L.PReLU(name="three"),
    ]
    with pytest.raises(ModelNotSupported) as refused:
        from_keras(ended(GRID, body))
    assert [each.split(":")[0] for each in refused.value.problems] == [
        "one (Conv2D)",
        "two (BatchNormalization)",
        "three (PReLU)",
    ]


def test_what_is_no_model_or_has_no_fixed_size_is_refused() -> None:
    with pytest.raises(ModelNotSupported, match=r"Dense is no keras\.Model"):
        from_keras(L.Dense(3))
    inputs = keras.Input((None, 4))
    with pytest.raises(ModelNotSupported, match="has no fixed size"):
        from_keras(keras.Model(inputs, L.LSTM(3)(inputs)))


def test_a_layer_with_weights_that_is_made_in_call_is_refused() -> None:
    class Anew(keras.Model):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return L.Dense(3)(x)

    with pytest.raises(ModelNotSupported, match="make it once, in __init__, and not in call"):
        from_keras(Anew(), (4,))


def test_without_keras_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloister_privacy.architecture.importers import keras_graph

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(keras_graph, "import_module", missing)
    with pytest.raises(ModelNotSupported, match=r'pip install "cloister\[keras\]"'):
        from_keras(object())
