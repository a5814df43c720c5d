"""The paper's figures, an audit of its methods at equal compute, and a comparison with its authors' own code."""
