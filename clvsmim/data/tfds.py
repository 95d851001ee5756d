"""TensorFlow Datasets in ArrayRecord files, read without TensorFlow.

Any data set with an image and a class label. TFDS prepares one, which does need
TensorFlow (docs/data.md); `clvsmim convert-data` rewrites what lies there as TFRecord.
"""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow_datasets

from clvsmim.data._files import Files, Opened, role


def make(
    *,
    split: str,
    dataset: str,
    train: str,
    test: str,
    lengths: tuple[int, int],
    classes: int,
    dir: str,
    image: str = "image",
    label: str = "label",
) -> Files:
    """A split of a prepared data set.

    Args:
      split: "train" or "test".
      dataset: as TFDS names it, "name", "name/config" or "name/config:version".
      train, test: what TFDS calls the two splits; "train[:1%]" is one, too.
      lengths: numbers of images in the two, `classes` of labels. What is given needs
        no file until the first image is read, and is checked then; 0 reads it.
      dir: the folder that holds the folder of the data set, local or gs://; "" is
        where TFDS puts it ($TFDS_DATA_DIR or ~/tensorflow_datasets).
      image, label: keys of the two in an example; label "" gives each the label 0.

    Raises:
      ValueError: now, lengths that cannot be; at the first image, a data set that is
        not there or not as told.
    """
    return prepared(
        _records, split, dataset, train, test, lengths, classes, dir, image, label
    )


def prepared(
    records: Callable,
    split: str,
    dataset: str,
    train: str,
    test: str,
    lengths: tuple[int, int],
    classes: int,
    dir: str,
    image: str,
    label: str,
) -> Files:
    """`make`, for `records(builder, split) -> something with len and [i] -> bytes`."""
    name, length = role(split, train, test, lengths)
    opened = functools.partial(_open, records, dataset, name, dir, image, label)
    return Files(name=dataset, where=name, open=opened, length=length, classes=classes)


def _open(
    records: Callable, dataset: str, split: str, dir: str, image: str, label: str
) -> Opened:
    try:
        builder = tensorflow_datasets.builder(dataset, data_dir=dir or None)
    except (tensorflow_datasets.core.DatasetNotFoundError, ImportError) as error:
        if "gcsfs" in str(error):
            raise
        raise ValueError(_missing(dataset, dir)) from error
    features = builder.info.features
    if not builder.info.splits:
        raise ValueError(_missing(dataset, dir))
    for key in (image, *([label] if label else [])):
        if key not in features:
            raise ValueError(
                f"{dataset} has no {key!r} in an example; set data.source.image and "
                f"data.source.label to two of: {', '.join(sorted(features))}"
            )
    try:
        found = records(builder, split)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"cannot read the split {split!r} of {dataset}: {error}; it has: "
            f"{', '.join(builder.info.splits)}"
        ) from error
    raw = {image: tensorflow_datasets.decode.SkipDecoding()}  # bytes, for Pillow

    def read(index: int) -> tuple[str, bytes, int]:
        example = features.deserialize_example_np(found[index], decoders=raw)
        name = f"{dataset}/{split}[{index}]"
        return name, example[image], int(example[label]) if label else 0

    return Opened(read, len(found), _names(features, label))


def _names(features: Any, label: str) -> tuple[str, ...]:
    """Of the classes; numbers if they have no names, none if there is no count."""
    if not label:
        return ("all",)
    found = features[label]
    names = getattr(found, "names", None)
    return tuple(names or map(str, range(getattr(found, "num_classes", None) or 0)))


def _records(builder: Any, split: str) -> Any:
    formats = {f.value for f in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise ValueError(
            f"it is prepared as {', '.join(formats)}; rewrite it with `clvsmim "
            f'convert-data {builder.data_dir} DST`, or read it with name="tfrecords"'
        )
    return builder.as_data_source(
        split,
        deserialize_method=tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES,
    ).data_source


def _missing(dataset: str, dir: str) -> str:
    where = f", data_dir='{dir}'" if dir else ""
    return (
        f"the data set {dataset} is not in {dir or 'the folder of TFDS'}; prepare it "
        f"once, in Python with TensorFlow: tensorflow_datasets.builder('{dataset}', "
        f"file_format='array_record'{where}).download_and_prepare()"
    )
