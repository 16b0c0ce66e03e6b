"""Sweep the rank from Python, one trial at a time, until another rank no longer helps.

python examples/ranks.py [key=value ...]
"""

import sys

import lorasweep


def main(overrides: list[str], ranks: tuple[int, ...] = (2, 4, 8, 16), enough: float = 0.01) -> int:
    """Return the first rank whose successor gains less than `enough`."""
    best, before = ranks[0], float("-inf")
    for r in ranks:
        result = lorasweep.run([f"lora.r={r}", *overrides])
        accuracy = result["metrics"]["accuracy"] if result["state"] == "COMPLETE" else float("-inf")
        print(f"r={r}: accuracy {accuracy:.4f}, {result['params']['trainable']:,} parameters, {result['folder']}")
        if accuracy < before + enough:
            break
        best, before = r, accuracy
    return best


if __name__ == "__main__":
    print("enough:", main(sys.argv[1:]))
