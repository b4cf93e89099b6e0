"""The page of ``tarflow demo``: :mod:`.tasks` computes what :mod:`.page` shows, and needs no gradio."""
