"""What several test files share: models, runs, tables of cases."""
