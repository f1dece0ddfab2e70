"""Foretoken: client, gateway and model tools in Python."""
