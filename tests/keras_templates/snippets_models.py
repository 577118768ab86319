"""Models that must work, and layers that are more than one op. See `snippets.py`, whose table this completes."""

from __future__ import annotations

from keras_generation import IS_KERAS3, keras, layers, ops

from keras_templates.snippets import IMAGE, TOKENS, snippet

# -- identity in the artifact -----------------------------------------------------------------------------------------


@snippet(IMAGE, low_bits=True)
def noise(x):
    y = layers.SpatialDropout2D(0.2)(layers.Conv2D(6, 1, activation="relu")(layers.Dropout(0.3)(x)))
    y = layers.GaussianDropout(0.1)(layers.GaussianNoise(0.1)(y))
    return layers.Dense(4)(layers.ActivityRegularization(l2=1e-3)(layers.AlphaDropout(0.1)(layers.Identity()(y))))


@snippet((10, 10, 3), data="pixels")
def augmentation(x):
    for layer in (
        layers.RandomFlip(), layers.RandomRotation(0.1), layers.RandomZoom(0.1), layers.RandomTranslation(0.1, 0.1),
        layers.RandomContrast(0.2), layers.RandomBrightness(0.2),
    ):  # fmt: skip
        x = layer(x)
    return layers.Conv2D(4, 3, activation="relu")(x)


@snippet((10, 10, 3), data="pixels")
def pixels(x):
    y = layers.Normalization(mean=[0.3, 0.5, 0.4], variance=[0.1, 0.2, 0.3])(layers.Rescaling(1 / 255.0)(x))
    return layers.Conv2D(4, 3, activation="relu")(y)


# -- normalizations and attention -------------------------------------------------------------------------------------

# A normalization divides by a small root: there one code of the root is several of the output.
MAGNIFIES = 4


@snippet(TOKENS, travels=MAGNIFIES)
def layer_norm(x):
    return layers.LayerNormalization()(layers.Dense(12)(x))


@snippet(IMAGE, travels=MAGNIFIES)
def group_norm(x):
    return [layers.GroupNormalization(4)(x), layers.GroupNormalization(-1)(layers.Conv2D(4, 1)(x))]


@snippet(TOKENS, travels=MAGNIFIES)
def unit_norm(x):
    return layers.UnitNormalization()(layers.Dense(12)(x))


@snippet(TOKENS, travels=MAGNIFIES, low_bits=True)
def attention(x):
    return layers.MultiHeadAttention(3, 4)(x, x)


@snippet((3, 4, 12), travels=MAGNIFIES)
def attention_over_two_axes(x):
    return layers.MultiHeadAttention(2, 4)(x, layers.Dense(12)(x))


@snippet(TOKENS, travels=MAGNIFIES)
def attention_scores(x):
    return list(layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x, return_attention_scores=True))


@snippet(TOKENS, travels=2 * MAGNIFIES)  # scores, which a softmax magnifies, of a tanh that is steep
def attention_by_products(x):
    q, v, k = layers.Dense(6)(x), layers.Dense(6)(x), layers.Dense(6)(x)
    return [
        layers.Attention()([q, v]), layers.Attention(use_scale=True, dropout=0.1)([q, v, k]),
        layers.Attention(score_mode="concat", use_scale=True)([q, v, k]),
    ]  # fmt: skip


@snippet(TOKENS, travels=MAGNIFIES)
def attention_by_sums(x):
    q, v, k = layers.Dense(6)(x), layers.Dense(6)(x), layers.Dense(6)(x)
    # Not [q, v, q]: the sum of a tensor and itself has twice its scale, and every other code lies on a tie.
    return [layers.AdditiveAttention()([q, v]), layers.AdditiveAttention(use_scale=False)([q, v, k])]


@snippet(TOKENS, travels=2 * MAGNIFIES)
def transformer_block(x):
    y = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 6)(x, x))
    z = layers.Dense(12)(layers.Dense(24, activation="gelu")(y))
    return layers.LayerNormalization()(layers.Add()([y, z]))


# -- models -----------------------------------------------------------------------------------------------------------


@snippet(IMAGE, travels=3, low_bits=True)
def layer_used_twice(x):
    conv = layers.Conv2D(8, 3, padding="same")
    return conv(layers.ReLU()(conv(x)))


@snippet(IMAGE, travels=3)
def models_in_models(x):
    i = keras.Input(IMAGE)
    inner = keras.Model(i, layers.ReLU()(layers.Conv2D(8, 3, padding="same", name="conv")(i)), name="inner")
    head = keras.Sequential([keras.Input(IMAGE), layers.Conv2D(4, 1, name="conv"), layers.Flatten()], name="head")
    return head(inner(inner(x)))


@keras.saving.register_keras_serializable(package="kquant-tests")
class Block(keras.Model):
    """A subclassed model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = layers.Conv2D(8, 3, padding="same")
        self.norm = layers.BatchNormalization()
        self.head = layers.Dense(5)

    def call(self, x):
        y = ops.relu(self.norm(self.conv(x)) + x)
        return self.head(ops.mean(y, axis=(1, 2)))


@keras.saving.register_keras_serializable(package="kquant-tests")
class Gate(layers.Layer):
    """A layer of one's own, with a weight and arithmetic."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="random_normal", name="factor")

    def call(self, x):
        return ops.sigmoid(x * self.factor) * x


@snippet(IMAGE, travels=2)
def custom_layer(x):
    return Gate()(layers.Conv2D(4, 1)(x))


@snippet(IMAGE, travels=2)
def subclassed_inside(x):
    return Block()(x)


# -- dead, zero and constant channels ---------------------------------------------------------------------------------


@snippet(IMAGE, low_bits=True)
def uneven_channels(x):
    return [
        layers.Conv2D(6, 3, name="uneven_conv")(x),
        layers.BatchNormalization()(layers.Conv2D(6, 3, name="uneven_normed")(x)),
        layers.DepthwiseConv2D(3, name="uneven_depthwise")(x),
        layers.Conv2DTranspose(6, 2, name="dead_transpose")(x),
        layers.Dense(3)(layers.ReLU()(layers.Conv2D(4, 3, name="dead_conv")(x))),
        layers.Dense(6, name="uneven_dense")(layers.Flatten()(x)),
    ]


@snippet(IMAGE)
def all_zero(x):
    return [x * 0, layers.Conv2D(4, 3, name="zero_conv")(x)]


@snippet(IMAGE)
def behind_all_zero(x):
    return layers.Dense(3)(layers.Conv2D(4, 3, name="zero_conv")(x))


# -- what the table as a whole must hold ------------------------------------------------------------------------------

SUBCLASSED = Block
# Layer classes that some snippet must hold.
REQUIRED_LAYERS = frozenset(
    """
    Conv1D Conv2D DepthwiseConv1D DepthwiseConv2D SeparableConv1D SeparableConv2D Conv1DTranspose Conv2DTranspose Dense
    EinsumDense Embedding BatchNormalization ReLU LeakyReLU PReLU ELU Softmax Activation Add Subtract Multiply Average
    Maximum Minimum Concatenate Dot MaxPooling1D MaxPooling2D AveragePooling1D AveragePooling2D GlobalMaxPooling1D
    GlobalMaxPooling2D GlobalAveragePooling1D GlobalAveragePooling2D UpSampling1D UpSampling2D Resizing ZeroPadding1D
    ZeroPadding2D Cropping1D Cropping2D Reshape Flatten Permute RepeatVector Dropout SpatialDropout2D GaussianNoise
    GaussianDropout AlphaDropout RandomFlip RandomRotation RandomZoom RandomTranslation RandomContrast RandomBrightness
    LayerNormalization GroupNormalization UnitNormalization MultiHeadAttention Rescaling Normalization Lambda
    Attention AdditiveAttention Sequential Functional
""".split()
) | {"GetItem" if IS_KERAS3 else "SlicingOpLambda"}
