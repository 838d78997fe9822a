"""Configs of other trainers, read and said in ours. What each option becomes is data: TOOL.yaml here, and
elsewhere.yaml in a model's folder, which says what the tools call that model and its files."""
