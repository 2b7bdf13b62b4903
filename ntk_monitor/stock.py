"""What TensorBoard's own widgets can show of a probe: scalars, one histogram, one image, and charts of several scalars.

Values are built from tensorboard's protos alone, in the format that both of its readers take without conversion.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_STRING
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent
from tensorboard.plugins.histogram import metadata as histograms
from tensorboard.plugins.image import metadata as images
from tensorboard.plugins.scalar import metadata as scalars


def scalar_value(tag: str, value: float, *, description: str = "") -> Summary.Value:
    """Return one number for the scalar dashboard, rounded to float32. The description is Markdown."""
    return Summary.Value(
        tag=tag,
        metadata=_classed(scalars.create_summary_metadata(None, description), DATA_CLASS_SCALAR),
        tensor=TensorProto(dtype=DT_FLOAT, tensor_shape=_shape(), float_val=[value]),
    )


def histogram_value(tag: str, values: ArrayLike, *, bins: int = 48, description: str = "") -> Summary.Value:
    """Return the distribution of the finite values for the histogram dashboard: (bins, 3) of left, right, count.

    For a spectrum pass log10 of the eigenvalues: the dashboard's axis is linear. Without a finite value all is zero.
    """
    data = np.asarray(values, dtype=np.float64).ravel()
    data = data[np.isfinite(data)]
    buckets = np.zeros((bins, 3))
    if data.size:
        low, high = float(data.min()), float(data.max())
        # Rounding leaves no room for `bins` edges between values this close, and equal ones need a width to be drawn.
        if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):
            low, high = low - 0.5 * max(1.0, abs(low)), high + 0.5 * max(1.0, abs(high))
        counts, edges = np.histogram(data, bins=bins, range=(low, high))
        buckets = np.stack([edges[:-1], edges[1:], counts], axis=1)
    return Summary.Value(
        tag=tag,
        metadata=_classed(histograms.create_summary_metadata(None, description), DATA_CLASS_TENSOR),
        tensor=TensorProto(
            dtype=DT_DOUBLE, tensor_shape=_shape(bins, 3), tensor_content=buckets.astype("<f8").tobytes()
        ),
    )


def image_value(tag: str, png_bytes: bytes, width: int, height: int, *, description: str = "") -> Summary.Value:
    """Return one picture for the image dashboard, at most 350 pixels wide or it gets a scroll bar."""
    return Summary.Value(
        tag=tag,
        metadata=_classed(images.create_summary_metadata(None, description), DATA_CLASS_BLOB_SEQUENCE),
        tensor=TensorProto(
            dtype=DT_STRING,
            tensor_shape=_shape(3),
            string_val=[str(width).encode(), str(height).encode(), png_bytes],
        ),
    )


def layout_value(category: str, charts: Mapping[str, Sequence[str]]) -> Summary.Value:
    """Return a layout for the custom-scalars dashboard: title of a chart → regular expressions of its scalars' tags.

    One layout per run: a later one, under the same tag, takes its place. TensorBoard joins those of several runs by the
    name of the category.
    """
    drawn = [Chart(title=title, multiline=MultilineChartContent(tag=tags)) for title, tags in charts.items()]
    layout = Layout(category=[Category(title=category, chart=drawn)])
    return Summary.Value(
        tag=custom_scalars.CONFIG_SUMMARY_TAG,
        metadata=_classed(custom_scalars.create_summary_metadata(), DATA_CLASS_TENSOR),
        tensor=TensorProto(dtype=DT_STRING, tensor_shape=_shape(), string_val=[layout.SerializeToString()]),
    )


def _shape(*sizes: int) -> TensorShapeProto:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])


def _classed(metadata: SummaryMetadata, data_class: int) -> SummaryMetadata:
    metadata.data_class = data_class
    return metadata
