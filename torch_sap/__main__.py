"""``python -m torch_sap``, the same as ``torch-sap``."""

from torch_sap.cli.main import run

if __name__ == "__main__":
    run()
