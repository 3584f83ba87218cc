"""ASGI middleware. Pure ASGI: it does not buffer streams or hide a client's disconnect."""
