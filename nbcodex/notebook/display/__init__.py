"""How one request or one map is shown below its cell, and what stays there."""
