"""The recipes that ship: installed, this folder is the package `trl_search.recipes`, and its files go by name."""
