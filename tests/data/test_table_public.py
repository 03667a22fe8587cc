"""Tables as cities and operators publish them: titles, percents, hours in columns, trips, stamps within intervals."""

import io
import zipfile

import numpy as np
import pytest

from data_prep import READERS
from data_prep.append import append
from data_prep.graphs import read_graph, read_nodes
from stdist.data import open_store


def lines(*rows: object) -> str:
    return "".join(f"{row if isinstance(row, str) else ','.join(map(str, row))}\n" for row in rows)


TRIPS = lines(
    "ride_id,started_at,ended_at,start_station_id,fare",
    "A1,2022-05-01 10:59:59.900,2022-05-01 11:20:00,07,1.5",
    "A2,2022-05-01 08:00:00.000,2022-05-01 08:20:00,HB1,1.5",
    "A3,2022-05-01 10:00:00.000,2022-05-01 10:20:00,07,1.5",
    "A4,2022-05-01 10:30:00.000,2022-05-01 10:31:00,,1.5",
    "A5,2022-05-04 00:10:00.000,2022-05-04 00:20:00,07,1.5",
)
COUNTED = {"time": "started_at", "place": "start_station_id", "cadence": 60, "duplicates": "count"}


def test_trips_are_counted(read_table):
    """An hour without a trip is 0; days without any are a gap; a trip without a station is told."""
    read = read_table(TRIPS, **COUNTED)
    assert read.ids == ["07", "HB1"] and read.values == {"count": [[0, 1], [0, 0], [2, 0], *[[0, 0]] * 13, [1, 0]]}
    assert read.stamps[:3] == [f"2022-05-01 {hour:02}:00" for hour in (8, 9, 10)]
    assert read.stamps[-2:] == ["2022-05-01 23:00", "2022-05-04 00:00"]
    assert "values = the count of rows" in read.plan.read_as
    assert read.plan.said[:2] == (
        "rows left out without a place: 1",
        "rows counted: 4; an interval without one is 0, a day without any a gap",
    )


def test_a_span_of_days(read_table, refused):
    read = read_table(TRIPS, **COUNTED, span="2022-05-02:2022-05-04", channel="pickups")
    assert read.stamps == ["2022-05-04 00:00"] and read.values == {"pickups": [[1, 0]]}
    assert "time steps of other days left out: 16" in read.plan.said
    with refused("no time step in --span 2021-01-01:2021-01-02, but 2022-05-01 to 2022-05-04"):
        read_table(TRIPS, **COUNTED, span="2021-01-01:2021-01-02")


def test_trips_refuse(read_table, refused):
    with refused("say how long it is: --cadence 60"):
        read_table(TRIPS, **COUNTED | {"cadence": None})
    with refused("choose one with --time"):
        read_table(TRIPS, **COUNTED | {"time": None})
    with refused("name it with --place: 'ride_id', 'started_at'"):
        read_table(TRIPS, **COUNTED | {"place": None})


def test_stamps_at_any_second_are_gathered_in_intervals(read_table, refused):
    rows = [f"2020-01-30 00:{row}" for row in ("00:48,1,10", "09:59,1,20", "10:03,1,7", "20:00,2,5")]
    text = lines("time,region_id,speed", *rows)
    with refused("00:00:48 is not a whole minute; give --cadence, with --duplicates mean or sum"):
        read_table(text)
    for how, first in (("mean", 15), ("sum", 30)):
        read = read_table(text, cadence=10, duplicates=how)
        assert read.stamps == ["2020-01-30 00:00", "2020-01-30 00:10", "2020-01-30 00:20"]
        assert read.values == {"speed": [[first, None], [7, None], [None, 5]]}


def test_wide_rows_are_gathered_in_intervals_of_local_time(read_table, refused):
    """Half past the hour in UTC is a whole hour in India."""
    rows = [(f"2020-01-30T{18 + k // 2}:{k % 2 * 30:02}:00Z", k, "" if k == 2 else 1) for k in range(4)]
    text = lines("time,a,b", *rows)
    read = read_table(text, cadence=60, duplicates="sum", utc_offset=330)
    assert read.stamps == ["2020-01-30 23:00", "2020-01-31 00:00", "2020-01-31 01:00"]
    assert read.values == {"value": [[0, 1], [3, 1], [3, 1]]}
    with refused("is wide, a row a time: --duplicates sum gathers rows of intervals; give --cadence"):
        read_table(text, duplicates="sum", utc_offset=330)


def test_stamps_within_their_intervals(read_table, refused):
    """National Highways: a day with a midnight of its own, ends of intervals a minute early."""
    rows = [f"M4/2295A,01/05/2023 00:00:00,{k // 4:02}:{k % 4 * 15 + 14}:00,{k},{k + 5}" for k in range(8)]
    text = lines("Site Name,Report Date,Time Period Ending,Time Interval,Total Volume", *rows)
    chosen = {"values": "Total Volume", "time_format": "%d/%m/%Y %H:%M:%S"}
    with refused("00:14 is off the 15-minute grid .*; give --cadence where stamps lie within their intervals"):
        read_table(text, **chosen)
    read = read_table(text, **chosen, cadence=15)
    assert read.stamps[:2] == ["2023-05-01 00:00", "2023-05-01 00:15"] and read.stamps[-1] == "2023-05-01 01:45"
    assert read.values == {"Total_Volume": [[k + 5] for k in range(8)]}
    assert "stamps as 00:14:00 are taken for the intervals they lie in, from 00:00:00 on" in read.plan.said
    with refused("frames are 14 minutes apart, not 15"):
        read_table(text.replace("01:59:00", "01:58:00"), **chosen, cadence=15)


@pytest.mark.parametrize("stamp", ["{d:02}/05/2021 {c}", "{d:02}/05/2021,{c}", "2021-05-{d}T{c}:00"])
def test_the_end_of_a_day_is_the_next_midnight(read_table, stamp):
    clocks = [(d, c) for d in (30, 31) for c in ("12:00", "24:00")]
    head = "date,time,flow,speed" if "," in stamp else "time,flow,speed"
    read = read_table(lines(head, *[stamp.format(d=d, c=c) + f",{d},1" for d, c in clocks]))
    assert read.stamps == ["2021-05-30 12:00", "2021-05-31 00:00", "2021-05-31 12:00", "2021-06-01 00:00"]
    assert [row[0] for row in read.values["value"]] == [30, 30, 31, 31]


def test_a_minute_of_24_is_no_midnight(read_table):
    read = read_table(lines("time,a,b", "2021-05-30 10:24:00,1,2", "2021-05-30 10:36:00,3,4"))
    assert read.stamps == ["2021-05-30 10:24", "2021-05-30 10:36"]


def test_a_clock_of_twelve_hours_beside_a_date(read_table):
    clocks = ["12:00 AM", "06:00 AM", "12:00 PM", "06:00 PM"]
    rows = [("North", "5/20/2021", clock, n) for n, clock in enumerate(clocks)]
    read = read_table(lines("Location,Count Date,Interval,Vehicles", *rows))
    assert read.stamps == [f"2021-05-20 {hour:02}:00" for hour in (0, 6, 12, 18)]


H24 = [f"H{hour:02}" for hour in range(1, 25)]


def test_hours_in_columns(read_table):
    """A row a place and day; hour 24 is the next midnight, as in a column of hours."""
    values = {day: ["" if hour == 4 else 100 * day + hour for hour in range(24)] for day in (29, 30)}
    rows = [(place, f"{day}/06/2021", *values[day], 9) for day in values for place in ("08", "102")]
    read = read_table(lines(",".join(["ESTACION", "FECHA", *H24, "TOTAL"]), *rows))
    assert read.ids == ["08", "102"] and len(read.stamps) == 48
    assert read.stamps[0] == "2021-06-29 01:00" and read.stamps[-1] == "2021-07-01 00:00"
    assert read.values["value"][3:6] == [[2903, 2903], [None, None], [2905, 2905]]
    assert read.plan.said == (
        "columns H01 … H24 are hours of the day, of which the last, hour 24, is stamped as the next midnight",
    )


def test_places_called_as_hours_are(read_table):
    """Their rows have a time of day."""
    read = read_table(lines(",".join(["time", *H24]), *[(f"2019-01-01 0{h}:00", *range(h, h + 24)) for h in (0, 1)]))
    assert read.ids == H24 and read.values["value"][1] == [*range(1, 25)]


def test_hours_in_columns_beside_a_date_in_three(read_table):
    """Federal counts: years of two digits, a station's direction in a column of its own."""
    head = ",".join(["Station_Id", "Travel_Dir", "Yr", "Mon", "Dy", *[f"Hour_{hour:02}" for hour in range(24)]])
    read = read_table(lines(head, *[("000123", way, 20, 6, 2, *range(way, way + 24)) for way in (1, 5)]),
                      place="Station_Id,Travel_Dir", time="Yr,Mon,Dy")  # fmt: skip
    assert read.ids == ["000123,1", "000123,5"] and read.stamps[23] == "2020-06-02 23:00"
    assert read.values["value"][23] == [24, 28]


@pytest.mark.parametrize("hours", [["00:00", "08:00", "16:00"], ["00:00-08:00", "08:00-16:00", "16:00-24:00"]])
def test_times_of_day_in_columns(read_table, hours):
    rows = [("2019-01-01", 1, 2, 3, 6), ("2019-01-02", 4, 5, 6, 15)]
    read = read_table({"a.csv": lines(["day", *hours, "Total"], *rows)})
    assert read.stamps[:4] == ["2019-01-01 00:00", "2019-01-01 08:00", "2019-01-01 16:00", "2019-01-02 00:00"]
    assert read.values == {"value": [[n] for n in range(1, 7)]} and read.ids == ["a"]


def test_counted_intervals_in_columns(read_table):
    """Victoria's signals: V00 … V95 of a site and detector. A row a time with columns of that name is wide."""
    names = [f"V{n:02}" for n in range(96)]
    days = [f"2020-01-0{day} 00:00:00" for day in (1, 2)]
    rows = [(100, day, detector, *range(detector, 96 + detector), 96) for day in days for detector in (1, 2)]
    text = lines(",".join(["SITE", "QT_INTERVAL", "DETECTOR", *names, "RECORDS"]), *rows)
    read = read_table(text, place="SITE,DETECTOR")
    assert read.ids == ["100,1", "100,2"] and len(read.stamps) == 192 and read.stamps[1] == "2020-01-01 00:15"
    assert read.values["value"][95] == [96, 97]
    wide = read_table(lines(",".join(["time", *names]), *[(f"2020-01-0{day}", *range(96)) for day in (1, 2)]))
    assert wide.ids == names and wide.stamps == ["2020-01-01 00:00", "2020-01-02 00:00"]


def test_kpi_of_cells_with_titles_percents_and_a_footer(read_table):
    """The cell, not its site, tells rows apart; NIL is missing; thousands and percents are numbers."""
    rows = [
        f'31/12/2022,{hour},SITE_A,{cell},"1,{hour}00.50",9{cell[-1]}.5%,{users}'
        for hour, users in enumerate(["7", "#DIV/0!", "NIL"])
        for cell in ("001", "002")
    ]
    text = lines("Report: cells", "From,31 December", "", "Date,Hour,Site,Cell name,Volume (GB),Success %,Users", *rows)
    read = read_table(text + "\nTotal rows: 6\n")
    assert read.ids == ["001", "002"] and read.stamps[-1] == "2022-12-31 02:00"
    assert read.values == {
        "Volume_GB": [[1000.5] * 2, [1100.5] * 2, [1200.5] * 2],
        "Success": [[91.5, 92.5]] * 3,
        "Users": [[7, 7], [None, None], [None, None]],
    }
    assert "lines above the table left out: 3" in read.plan.said


def test_an_id_of_rows_is_no_place(read_table, refused):
    """Where rows of a site differ they are refused, not taken for places of their own."""
    rows = [(f"2019-01-01 0{hour}:00", "A", number, 5 + number) for hour, number in [(0, 7), (0, 3), (1, 9), (1, 4)]]
    with refused("occurs twice with different values"):
        read_table(lines("time,site,id,flow", *rows))


def test_a_row_cut_short_is_no_footer(read_table, refused):
    text = lines("site,time,n", "North Gate,2019-01-01 00:00,1", "North Gate,2019-01-01 01:00,2", "North Ga")
    with refused("line 4: 1 columns instead of 3"):
        read_table(text)


def test_dots_of_millions_are_no_decimals(read_table):
    read = read_table("time;a;b\n2019-01-01;1.501.162;7\n2019-01-02;12.250;8\n")
    assert read.values == {"value": [[1501162, 7], [12250, 8]]}


def test_places_of_several_columns(read_table):
    """Site and direction; whole numbers are a grid's cells under names of rows and columns alone."""
    pairs = [(site, detector) for site in (1, 305) for detector in (1, 11)]
    rows = [(f"2022-01-01 0{h}:00", s, d, "E", 10 * s + d + h) for h in (0, 1) for s, d in pairs]
    text = lines("end_time,site,detector,way,volume", *rows)
    read = read_table(text, place="site,detector", values="volume")
    assert read.ids == ["1,1", "1,11", "305,1", "305,11"] and read.values["volume"][0] == [11, 21, 3051, 3061]
    assert read_table(text, place="site,detector,way", values="volume").ids[0] == "1,1,E"


def test_ids_of_others_are_no_values(read_table):
    rows = [(f"2022-01-01 0{h}:00", arc, 100 + arc, h, 7) for h in (0, 1) for arc in (1, 2)]
    read = read_table(lines("time,Identifiant arc,Identifiant noeud,flow,rate", *rows))
    assert read.ids == [1, 2] and [*read.values] == ["flow", "rate"]


def test_numbers_between_runs_of_blanks(read_table):
    """Abilene's matrices: a blank behind every number. Others are set in columns of one width."""
    read = read_table({"a.txt": "1.5 2 3 \n4 5 6.25 \n"}, start="2019-01-01", cadence=60)
    assert read.values == {"value": [[1.5, 2, 3], [4, 5, 6.25]]}
    read = read_table({"a.txt": "   1.5  12\n  14.0   5\n"}, start="2019-01-01", cadence=60)
    assert read.values == {"value": [[1.5, 12], [14, 5]]}


def test_what_lies_beside_tables_in_an_archive(read_table):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number, day in enumerate(["31-01-2021", "01-02-2021"], start=1):
            archive.writestr(f"2021/0{number}.csv", f"sensor,time,count\ns1,{day} 00:00,{number}\n")
        archive.writestr("README.txt", "Counts of 2021.\nSee the site.\n")
    read = read_table({"a.zip": packed.getvalue()})
    assert read.stamps == ["2021-01-31 00:00", "2021-02-01 00:00"] and read.values == {"count": [[1], [2]]}


def test_files_whose_days_are_told_by_another(read_table):
    """01/02 may be either; the file of the thirteenth tells."""
    head = "time,place,n"
    rows = {day: [(f"01/{day}/2019 0{h}:00", p, h) for h in (0, 1) for p in "ab"] for day in (12, 13)}
    read = read_table({f"{day}.csv": lines(head, *rows[day]) for day in rows})
    assert [stamp[:10] for stamp in read.stamps] == ["2019-01-12"] * 2 + ["2019-01-13"] * 2


def test_graph_and_places_of_atomic_files(tmp_path, refused):
    """LibCity's .rel and .geo."""
    ids = np.array([773, 767])
    geo, rel = tmp_path / "a.geo", tmp_path / "a.rel"
    geo.write_text('geo_id,type,coordinates\n767,Point,"[-118.2, 34.1]"\n773,Point,"[-118.3, 34.15]"\n')
    nodes = read_nodes(geo, ids)
    assert nodes.latitude.tolist() == [34.15, 34.1] and nodes.longitude.tolist() == [-118.3, -118.2]
    rel.write_text("rel_id,type,origin_id,destination_id,cost\n0,geo,773,767,1000\n1,geo,767,773,1000\n")
    weights, _ = read_graph(rel, ids, dcrnn=True)
    np.testing.assert_allclose(weights, np.array([[0, 1], [1, 0]]))
    geo.write_text('geo_id,type,coordinates\n767,Polygon,"[[[0, 1], [1, 1]]]"\n773,Point,"[-118.3, 34.15]"\n')
    with refused("no column of the latitude"):
        read_nodes(geo, ids)


def test_later_trips_are_appended_as_the_first_were_counted(tmp_path, prepared):
    """The span is of the files it was given with."""
    first, later = tmp_path / "may.csv", tmp_path / "june.csv"
    first.write_text(TRIPS)
    prepared(READERS["table"].plan([first], **COUNTED, span="2022-05-01:2022-05-01"))
    later.write_text(TRIPS.replace("2022-05-01", "2022-05-02"))
    append(tmp_path / "out.zarr", [later])
    store = open_store(tmp_path / "out.zarr")
    assert str(store.days) == "2022-05-01:2022-05-04"
    assert store.values("count", 10, 11).tolist() == store.values("count", 34, 35).tolist() == [[2, 0]]
