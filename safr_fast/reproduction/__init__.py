"""The paper's tables and its Figure 3: what is missing is trained and evaluated, and set beside the paper's figures."""
