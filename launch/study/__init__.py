"""The study: arms, seeds and pairs of teacher and student, each run alike, kept in one table and told in one page."""
