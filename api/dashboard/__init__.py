"""The dashboard: its files and their addresses. It shows and does what `/v1` offers to every script."""
