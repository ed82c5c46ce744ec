"""Questions put to models and routers, and their answers as values."""
