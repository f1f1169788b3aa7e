from diptych.curate.fetch.schedule import Download, Schedule, host_of


def jobs(*urls: str) -> list[Download]:
    return [Download(url, host_of(url)) for url in urls]


def test_no_host_has_more_than_its_share():
    schedule = Schedule(per_host=2)
    for job in jobs("http://a/1", "http://a/2", "http://a/3", "http://b/1"):
        schedule.add(job)
    first = [schedule.take(0.0) for _ in range(3)]
    assert sorted(job.url for job in first if isinstance(job, Download)) == ["http://a/1", "http://a/2", "http://b/1"]
    assert schedule.take(0.0) is None  # until one of a's is finished
    schedule.finish(next(job for job in first if isinstance(job, Download) and job.host == "a"))
    third = schedule.take(0.0)
    assert isinstance(third, Download)
    assert third.url == "http://a/3"
    assert len(schedule) == 0


def test_a_paused_host_waits_and_others_do_not():
    schedule = Schedule(per_host=1)
    first, second, other = jobs("http://a/1", "http://a/2", "http://b/1")
    schedule.add(first)
    assert schedule.take(0.0) is first
    schedule.add(second)
    schedule.add(other)
    schedule.pause("a", 5.0)
    schedule.finish(first)
    assert schedule.take(1.0) is other
    assert schedule.take(1.0) == 5.0
    assert schedule.take(5.0) is second


def test_a_job_may_be_put_off():
    schedule = Schedule(per_host=1)
    (job,) = jobs("http://a/1")
    schedule.add(job, at=3.0)
    assert schedule.take(1.0) == 3.0
    assert len(schedule) == 1
    assert schedule.take(3.0) is job


def test_a_slow_host_begins_one_job_at_a_time_and_at_its_pace():
    schedule = Schedule(per_host=4)
    several = jobs(*(f"http://a/{i}" for i in range(4)))
    schedule.add(several[0])
    assert schedule.take(0.0) is several[0]
    schedule.slow("a", 2.0)
    schedule.finish(several[0])
    for job in several[1:]:
        schedule.add(job)
    assert schedule.take(1.0) == 2.0
    assert schedule.take(2.0) is several[1]
    assert schedule.take(2.0) == 4.0
    schedule.finish(several[1])
    assert schedule.take(4.5) is several[2]
    assert schedule.take(6.0) == 6.5


def test_failures_in_a_row_are_counted():
    schedule = Schedule(per_host=1)
    (job,) = jobs("http://a/1")
    schedule.add(job)
    schedule.take(0.0)
    assert [schedule.note("a", reached=reached) for reached in (False, False, True, False)] == [1, 2, 0, 1]
    assert schedule.failures("a") == 1


def test_hosts_without_jobs_are_forgotten():
    schedule = Schedule(per_host=1)
    for number in range(1000):
        (job,) = jobs(f"http://host{number}/x")
        schedule.add(job)
        assert schedule.take(float(number)) is job
        schedule.finish(job)
    assert len(schedule._hosts) == 0


def test_hosts_are_told_apart_by_port_and_not_by_case():
    assert host_of("HTTP://User@Example.com:81/x") == "example.com:81"
    assert host_of("http://[broken") == ""
