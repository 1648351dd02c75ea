"""Python functions as tools, and the contract that is enforced on them."""
