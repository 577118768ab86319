"""What the attributes of an op say is what the file computes: the file beside the float graph's own values.

`verify` compares a file with the trained graph; that a constant is cut off in both, it cannot see.
"""

import numpy as np
import pytest
import tensorflow as tf

import kquant

from .nets import v1
from .trained import IMAGES, weight

IDS = np.random.default_rng(1).integers(0, 10, (16, 6)).astype(np.int32)
PIXELS = np.random.default_rng(2).integers(0, 255, (16, 64)).astype(np.uint8)


def convolved(x, name="conv"):
    return tf.nn.conv2d(x, weight(name, 3, 3, x.shape[-1], 4), 1, "SAME")


# -- of floats --------------------------------------------------------------------------------------------------------


def low_padding(x):
    return tf.pad(tf.nn.relu(convolved(x)), [[0, 0], [2, 1], [0, 3], [0, 2]], constant_values=-5.0)


def high_padding(x):
    return tf.pad(tf.nn.relu6(convolved(x)), [[0, 0], [2, 1], [0, 3], [0, 2]], constant_values=9.0)


def padding_that_maxima_pass_over(x):
    y = tf.pad(tf.nn.relu(convolved(x)), [[0, 0], [1, 1], [0, 2], [0, 0]], constant_values=-1e9)
    return tf.nn.max_pool2d(y, 3, 2, "VALID")


def number_as_bias(x):
    y = tf.nn.conv2d(x, weight("kernel", 3, 3, 3, 1), 1, "SAME")
    return tf.nn.relu(y + v1.get_variable("offset", initializer=0.5))


def new_axis_in_front(x):
    return convolved(x)[:, tf.newaxis, 1:3]


def new_axes_around_an_ellipsis(x):
    return convolved(x)[:, 2, tf.newaxis, ..., tf.newaxis]


def new_axis_for_a_mask(x):
    return convolved(x) * tf.nn.softmax(convolved(x, "scores")[..., 0])[..., None]


def scaled_before_a_mask(x):
    y = tf.nn.relu(convolved(x)) * 0.1
    return convolved(y * tf.floor(tf.random.uniform(tf.shape(y)) + 1.0), "last")


def scaled_before_a_mask_that_is_fed(x):
    y, keep = tf.nn.relu(convolved(x)) * 0.1, v1.placeholder_with_default(1.0, [])
    return convolved(y * tf.cast(tf.random.uniform(tf.shape(y)) < keep, tf.float32), "last")


def scaled_before_dropout(x):
    y, keep = tf.nn.relu(convolved(x)) / 10.0, v1.placeholder_with_default(1.0, [])
    return convolved(y / keep * tf.floor(tf.random.uniform(tf.shape(y)) + keep), "last")


def twice_as_large(x):
    y = convolved(tf.nn.max_pool2d(x, 2, 2, "SAME"))
    return convolved(v1.image.resize_nearest_neighbor(y, 2 * tf.shape(y)[1:3]), "last")


def up_and_up_again(x):
    """As U-Nets are written: the sizes of a transposed convolution are multiples of its input's."""
    y = tf.nn.max_pool2d(tf.nn.relu(convolved(x)), 4, 4, "SAME")
    for i in range(2):
        size = tf.concat([tf.shape(y)[:1], tf.shape(y)[1:3] * 2, [4]], 0)
        kernel = weight(f"up{i}", 2, 2, 4, y.shape[-1])
        y = tf.nn.relu(tf.nn.conv2d_transpose(y, kernel, size, [1, 2, 2, 1], "SAME"))
        y = convolved(y, f"after{i}")
    return tf.concat([y, x], 3)


def rows_of_boxes(x):
    y = convolved(x)
    return tf.reshape(y, tf.stack([tf.shape(x)[0], -1, 1, 2]))


# -- of integers ------------------------------------------------------------------------------------------------------


def flat_ids(ids):
    found = tf.gather(weight("table", 10, 4), tf.reshape(ids, [-1]))
    return tf.matmul(tf.reshape(found, [-1, 24]), weight("dense", 24, 3))


def ids_of_columns(ids):
    found = [tf.nn.embedding_lookup(weight(f"table{i}", 10, 4), ids[:, i]) for i in range(2)]
    return tf.matmul(tf.concat(found, 1), weight("dense", 8, 3))


def ids_in_parts(ids, strategy, sizes):
    parts = [weight(f"part{i}", n, 4) for i, n in enumerate(sizes)]
    found = v1.nn.embedding_lookup(parts, ids, partition_strategy=strategy)
    return tf.matmul(tf.reshape(found, [-1, 24]), weight("dense", 24, 3))


def ids_in_turn(ids):
    return ids_in_parts(ids, "mod", (4, 3, 3))


def ids_in_a_row(ids):
    return ids_in_parts(ids, "div", (4, 3, 3))


def turned_ids(ids):
    return tf.nn.embedding_lookup(weight("table", 10, 4), tf.transpose(tf.reshape(ids, [-1, 2, 3]), [0, 2, 1]))


def ids_with_a_new_axis(ids):
    return tf.squeeze(tf.nn.embedding_lookup(weight("table", 10, 4), tf.expand_dims(ids, 1)), [1])


def pixels_in_rows(x):
    return convolved(tf.cast(tf.reshape(x, [-1, 8, 8, 1]), tf.float32) / 255.0)


def some_of_the_pixels(x):
    return tf.matmul(tf.cast(x[..., ::2], tf.float32) / 255.0, weight("dense", 32, 3))


CASES = {
    IMAGES.shape: (low_padding, high_padding, padding_that_maxima_pass_over, number_as_bias, new_axis_in_front,
                   new_axes_around_an_ellipsis, new_axis_for_a_mask, scaled_before_a_mask,
                   scaled_before_a_mask_that_is_fed, scaled_before_dropout, twice_as_large, up_and_up_again,
                   rows_of_boxes),
    IDS.shape: (flat_ids, ids_of_columns, ids_in_turn, ids_in_a_row, turned_ids, ids_with_a_new_axis),
    PIXELS.shape: (pixels_in_rows, some_of_the_pixels),
}  # fmt: skip
DATA = {a.shape: a for a in (IMAGES, IDS, PIXELS)}


def started(build, data, batch=None):
    """The session of a float graph, its output, and what it computes."""
    graph = tf.Graph()
    with graph.as_default():
        x = v1.placeholder(data.dtype, [batch, *data.shape[1:]], name="x")
        y = build(x)
        session = v1.Session()
        session.run(v1.global_variables_initializer())
        return session, y, session.run(y, {x: data})


@pytest.mark.parametrize(
    ("build", "shape"), [(b, s) for s, bs in CASES.items() for b in bs], ids=lambda v: getattr(v, "__name__", "")
)
def test_the_file_computes_what_the_graph_does(build, shape, tmp_path):
    data = DATA[shape]
    session, y, expected = started(build, data)
    kquant.QAT_Quantizer()(session.graph, data, training=False, session=session, outputs=[y])
    path = tmp_path / "model.tflite"
    kquant.export_tflite(session, path)
    report = kquant.verify(session, path, data)
    assert report.ok, report.problems
    got = kquant.load_artifact(path)(data)
    assert got.shape == expected.shape
    # A wrong value is off by as much as there is; 8 bits are off by 1 % after a layer or two.
    assert np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)


# -- what is refused --------------------------------------------------------------------------------------------------


def other_indices_for_each_sample(x):
    return tf.gather(convolved(x), np.tile([[3, 1]], (len(IMAGES), 1)), axis=1, batch_dims=1, name="picked")


def counted_ids(ids):
    return tf.nn.embedding_lookup(weight("table", 10, 4), tf.add(ids, -0, name="picked"))


@pytest.mark.parametrize(
    ("build", "data", "match"),
    [
        (other_indices_for_each_sample, IMAGES, "'picked'.*batch_dims"),
        (counted_ids, IDS, "'picked'.*of integers"),
    ],
    ids=["batch_dims", "arithmetic of ids"],
)
def test_what_has_no_kernel_is_refused_by_name(build, data, match):
    session, y, _ = started(build, data, len(data))
    before = session.graph.as_graph_def()
    with pytest.raises(kquant.UnsupportedError, match=match):
        kquant.QAT_Quantizer()(session.graph, data, training=False, session=session, outputs=[y])
    assert session.graph.as_graph_def() == before


def test_a_padding_that_no_range_holds_is_refused(tmp_path):
    session, y, _ = started(
        lambda x: tf.pad(tf.nn.softmax(x), [[0, 0], [1, 1], [0, 0], [0, 0]], constant_values=-5.0), IMAGES
    )
    kquant.QAT_Quantizer()(session.graph, IMAGES, training=False, session=session, outputs=[y], inputs=["x"])
    with pytest.raises(kquant.RangeError, match=r"'PadV2'.*\[0, 0.996.*-5"):
        kquant.export_tflite(session, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())
