"""How blockwise losses are summed and differentiated."""
