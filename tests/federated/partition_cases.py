"""What the tests of partitions share: labels, comparisons, a check of what a partition is."""

import hashlib
import json

import numpy as np


def labels_of(n, classes):
    """Uneven, unsorted and free of any generator, so that goldens depend on the split alone."""
    return [(i * i * 7 + i // 3 + i * i // 11) % classes for i in range(n)]


LABELS = labels_of(2000, 10)


def lists(parts):
    return [part.tolist() for part in parts]


def digest(parts):
    return hashlib.sha256(json.dumps(lists(parts)).encode()).hexdigest()[:16]


def assert_partition(parts, num_examples, covers=True):
    assert all(part.dtype == np.int64 and part.ndim == 1 and len(part) for part in parts)
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < num_examples
    if covers:
        assert len(rows) == num_examples


def class_counts(labels, parts):
    labels = np.asarray(labels)
    return np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])
