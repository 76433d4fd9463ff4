"""How do a package's pickled tables become parquet? ``python -m mllm.data.charts.unpack FOLDER OUTPUT``, its own process."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path

from mllm.data.charts.tables import pickled


def unpack(root: Path, output: Path) -> int:
    """Write every pickled data frame as parquet; returns how many. A file that holds none, or will not be read or written, is
    named in ``skipped.txt``."""
    import pandas as pd

    count, skipped = 0, []
    for path, inner in pickled(root):
        try:
            frame = pd.read_pickle(path, compression="xz" if path.name.endswith(".compress") else "infer")
            if not isinstance(frame, pd.DataFrame):
                raise TypeError(f"holds a {type(frame).__name__}")
            target = output / inner.parent / f"{inner.name}.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            plain = frame.reset_index(drop=True)
            plain.columns = [str(column) for column in plain.columns]
            odd = [c for c in plain.columns if plain[c].dtype == object or str(plain[c].dtype) == "category"]
            plain = plain.assign(**{c: plain[c].map(str, na_action="ignore").astype(object) for c in odd})
            plain.to_parquet(target)
            count += 1
        except (Exception, pickle.UnpicklingError) as error:
            skipped.append(f"{inner}: {type(error).__name__}: {error}"[:200])
    output.mkdir(parents=True, exist_ok=True)
    (output / "skipped.txt").write_text("".join(f"{line}\n" for line in skipped), encoding="utf-8")
    (output / "complete").write_text(f"{count}\n", encoding="utf-8")
    return count


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(unpack(Path(sys.argv[1]), Path(sys.argv[2])), "tables")
