"""Files as the author's code pickles them: classes of the same module paths, states and conventions, made here."""

import pickle
import sys
import types
from pathlib import Path

import numpy as np


def author_classes(module: str = "ep.discovery.dictionary", names: tuple[str, str] = ("Dictionary", "Partition")):
    """Two plain classes that pickle under a module path of the author's; nothing of his is imported."""
    home = types.ModuleType(module)
    for name in names:
        setattr(home, name, type(name, (), {"__module__": module}))
    return home, getattr(home, names[0]), getattr(home, names[1])


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def make_state(k: int = 12, d: int = 16, threshold: float = 0.3, seed: int = 0, reservoir: int = 3):
    """State of a dictionary and of its regions, with everything that a real one holds."""
    rng = np.random.default_rng(seed)
    exemplars = unit(np.eye(k, d) + 0.1 * rng.standard_normal((k, d))) if k <= d else unit(rng.standard_normal((k, d)))
    prompts = [f"prompt {i} with é, 漢 and a long tail {'x' * (10 * i)}\nline" for i in range(30)]
    regions = []
    for i, exemplar in enumerate(exemplars):
        n = int(rng.integers(1, 6))
        members = unit(exemplar + 0.05 * rng.standard_normal((n, d)))
        members[0] = exemplar
        total = members.sum(axis=0)
        distances = 1 - members @ exemplar
        nearest = [(-float(distance), prompts[(i + j) % 30], j + 1) for j, distance in enumerate(distances)]
        regions.append(
            {
                "member_count": n,
                "exemplar_direction": exemplar.copy(),
                "mean_member_direction": unit(total),
                "member_coherence": float(np.linalg.norm(total) / n),
                "sum_dist_to_exemplar": float(distances.sum()),
                "sum_sq_dist_to_exemplar": float((distances**2).sum()),
                "source_iterations": {0, i, 300 + i},
                "constituent_sample_indices": [7 * i, *(int(v) for v in rng.integers(0, 10**6, n - 1))],
                "sample_prompts": sorted(nearest),
                "boundary_prompts": sorted((-distance, text, position) for distance, text, position in nearest),
                "sample_members": [row.copy() for row in members[:reservoir]],
                "label": "about things" if i == 1 else None,
            }
        )
    state = {
        "center": (3 * rng.standard_normal(d)).astype(np.float32),
        "threshold": threshold,
        "merge_close": False,
        "_last_batch_new_partition_rate": 0.0,
        # As the author grows it: the rows behind the last region hold whatever was in memory.
        "_exemplars": np.concatenate([exemplars, np.full((4, d), np.nan, dtype=np.float32)]),
        "_exemplars_capacity": k + 4,
    }
    return state, regions


def pickled(
    state,
    regions,
    protocol: int = 4,
    *,
    module="ep.discovery.dictionary",
    names=("Dictionary", "Partition"),
    numpy_core="numpy._core",
) -> bytes:
    """The bytes that the author's code would write."""
    home, dictionary_class, region_class = author_classes(module, names)
    partitions = []
    for region in regions:
        partitions.append(region_class())
        partitions[-1].__dict__.update(region)
    dictionary = dictionary_class()
    dictionary.__dict__.update({"partitions": partitions} | state)
    content = _dumped(dictionary, home, protocol)
    return content if numpy_core == "numpy._core" else respelt(content, protocol)


def pickled_shared(state, region, times: int) -> bytes:
    """A dictionary whose regions are different objects that share all that they hold."""
    home, dictionary_class, region_class = author_classes()
    dictionary = dictionary_class()
    dictionary.__dict__.update({"partitions": []} | state)
    for _ in range(times):
        item = region_class()
        item.__dict__.update(region)
        dictionary.partitions.append(item)
    return _dumped(dictionary, home, 4)


def _dumped(dictionary, home: types.ModuleType, protocol: int) -> bytes:
    parts = home.__name__.split(".")
    modules = {".".join(parts[: i + 1]): types.ModuleType(".".join(parts[: i + 1])) for i in range(len(parts) - 1)}
    before = {name: sys.modules.get(name) for name in (*modules, home.__name__)}
    sys.modules.update(modules | {home.__name__: home})
    try:
        return pickle.dumps(dictionary, protocol=protocol)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def respelt(content: bytes, protocol: int) -> bytes:
    """The same pickle from numpy 1: ``numpy.core`` where numpy 2 says ``numpy._core``, one character less."""
    if protocol < 4:
        return content.replace(b"cnumpy._core.", b"cnumpy.core.")
    changed = content
    for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        old, new = name, name.replace(b"_core", b"core")
        changed = changed.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
    return _without_frames(changed, content)


def _without_frames(changed: bytes, original: bytes) -> bytes:
    """Frames state their length, and a shorter name changes it; the framing is optional, so it is taken out."""
    import pickletools

    places = [position for opcode, _, position in pickletools.genops(original) if opcode.name == "FRAME"]
    assert places, "a pickle of protocol 4 has frames"
    headers = {original[position : position + 9] for position in places}
    for header in headers:
        changed = changed.replace(header, b"")
    return changed


def write(folder: Path, content: bytes, name: str = "gemma-2-2b_layer12.pkl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path
