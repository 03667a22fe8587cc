"""Tables in the shapes of public data sets: each in a few lines, with the values that must come out."""

import gzip
import io
import zipfile

import pytest

HOURS = [f"2019-01-01 {hour:02}:00" for hour in range(4)]


def lines(*rows: object, mark: str = ",") -> str:
    return "".join(f"{row if isinstance(row, str) else mark.join(map(str, row))}\n" for row in rows)


def test_wide_with_stamps(read_table):
    read = read_table(lines("time,b,a", *[(stamp, i, i + 0.5) for i, stamp in enumerate(HOURS)]), channel="speed")
    assert read.stamps == HOURS and read.ids == ["b", "a"] and read.plan.spec.cadence_minutes == 60
    assert read.values == {"speed": [[0, 0.5], [1, 1.5], [2, 2.5], [3, 3.5]]}
    assert read.plan.read_as == (
        "read as: wide, a column a place, time = `time` (local), 2 places `b`, `a`, channels speed"
    )


def test_long_with_two_channels(read_table):
    """Rows sorted by place: the first ones are of one place alone."""
    rows = [(place, stamp, i + place, 2 * i) for place in (12, 7) for i, stamp in enumerate(HOURS)]
    read = read_table(lines("id,datetime,internet,sms_in", *rows))
    assert read.ids == [7, 12] and read.stamps == HOURS
    assert read.values == {"internet": [[i + 7, i + 12] for i in range(4)], "sms_in": [[2 * i] * 2 for i in range(4)]}
    assert "long, place = `id`, time = `datetime` (local)" in read.plan.read_as
    assert "values = `internet`, `sms_in`" in read.plan.read_as


def test_a_pair_without_a_row_is_missing(read_table):
    read = read_table(lines("id,time,v", (1, HOURS[0], 5), (2, HOURS[0], 6), (1, HOURS[1], 7), (2, HOURS[3], 8)))
    assert read.values == {"v": [[5, 6], [7, None], [None, 8]]}
    assert read.stamps == [HOURS[0], HOURS[1], HOURS[3]]


def test_semicolons_decimal_commas_and_a_time_without_a_name(read_table):
    """UCI's electricity: LD2011_2014.txt."""
    text = '"";"MT_001";"MT_002"\n"2011-01-01 00:15:00";3,5;0,25\n"2011-01-01 00:30:00";4;1,125\n'
    read = read_table({"LD2011_2014.txt": text})
    assert read.ids == ["MT_001", "MT_002"] and read.stamps == ["2011-01-01 00:15", "2011-01-01 00:30"]
    assert read.values["value"] == [[3.5, 0.25], [4, 1.125]]


def test_one_place_with_values_chosen(read_table):
    """UCI's Metro Interstate traffic: an hour with two weathers has two rows, whose traffic is one."""
    rows = [f"None,288.28,Clouds,{stamp}:00,{100 + i}" for i, stamp in enumerate(HOURS)]
    text = lines(
        "holiday,temp,weather_main,date_time,traffic_volume", *rows, "None,288.28,Rain,2019-01-01 03:00:00,103"
    )
    read = read_table({"Metro.csv": text}, values="traffic_volume")
    assert read.ids == ["Metro"] and read.values == {"traffic_volume": [[100], [101], [102], [103]]}
    assert read.plan.said == ("rows merged that repeat others: 1",)


def test_year_month_day_and_hour_in_columns(read_table):
    """UCI's Beijing air: a row number, NA, text beside, a place in every row."""
    rows = [f"{i + 1},2013,3,1,{i},{'NA' if i == 2 else 4 + i},NNW,Aotizhongxin" for i in range(4)]
    read = read_table(lines("No,year,month,day,hour,PM2.5,wd,station", *rows))
    assert read.ids == ["Aotizhongxin"] and read.stamps[3] == "2013-03-01 03:00"
    assert read.values == {"PM2_5": [[4], [5], [None], [7]]}


def test_pedestrians_with_hour_columns_names_of_months_and_thousands(read_table):
    """Melbourne: an id of rows, a stamp in words, its parts again, names of sensors beside their ids."""
    rows = [
        f'{2887628 + 2 * i + k},"November 01, 2019 {hour}",2019,November,1,Friday,{17 + i},{34 - k},Flinders,"{count}"'
        for i, (hour, count) in enumerate([("05:00:00 PM", "1,300"), ("06:00:00 PM", "604")])
        for k in (0, 1)
    ]
    read = read_table(lines("ID,Date_Time,Year,Month,Mdate,Day,Time,Sensor_ID,Sensor_Name,Hourly_Counts", *rows))
    assert read.ids == [33, 34] and read.stamps == ["2019-11-01 17:00", "2019-11-01 18:00"]
    assert read.values == {"Hourly_Counts": [[1300, 1300], [604, 604]]}


@pytest.mark.parametrize("date", ["SensingDate", "dteday"])
def test_a_date_and_an_hour(read_table, date):
    rows = [(7, "2019-11-01", hour, 10 + hour) for hour in (0, 1, 23)]
    read = read_table(lines(f"Sensor_ID,{date},HourDay,Total", *rows))
    assert read.stamps == ["2019-11-01 00:00", "2019-11-01 01:00", "2019-11-01 23:00"]
    assert read.values == {"Total": [[10], [11], [33]]}


def test_a_date_and_a_time_of_day(read_table):
    """UCI's household power, and its air quality with dots for colons and blank columns and rows at the end."""
    read = read_table({"a.txt": "Date;Time;P;V\n16/12/2006;17:24:00;4.25;234\n16/12/2006;17:25:00;?;235\n"})
    assert read.stamps == ["2006-12-16 17:24", "2006-12-16 17:25"]
    assert read.values["value"] == [[4.25, 234], [None, 235]]
    text = "Date;Time;CO(GT);C6H6;;\n13/03/2004;18.00.00;2,6;11,9;;\n13/03/2004;19.00.00;2;9,4;;\n;;;;;\n;;;;;\n"
    read = read_table({"b.csv": text}, values="CO(GT),C6H6", channel="co,benzene")
    assert read.stamps == ["2004-03-13 18:00", "2004-03-13 19:00"]
    assert read.values["benzene"] == [[pytest.approx(11.9)], [pytest.approx(9.4)]]


def test_smart_meters(read_table):
    """London: seven digits of a second, blanks, Null at an odd second, a row twice, two files."""
    head = "LCLid,tstp,energy(kWh/hh)\n"
    one = "MAC000002,2012-10-12 00:30:00.0000000, 0.5 \nMAC000002,2012-10-12 01:00:00.0000000, 0 \n"
    odd = "MAC000002,2012-10-12 15:13:41.0000000,Null\nMAC000002,2012-10-12 01:00:00.0000000, 0 \n"
    two = "MAC000003,2012-10-12 01:00:00.0000000, 2 \n"
    read = read_table({"block_1.csv": head + one + odd, "block_0.csv": head + two})
    assert read.ids == ["MAC000002", "MAC000003"] and read.stamps == ["2012-10-12 00:30", "2012-10-12 01:00"]
    assert read.values == {"energy_kWh_hh": [[0.5, None], [0, 2]]}
    assert len(read.plan.said) == 2


def test_turned(read_table):
    """A row a place, a column a time; a name beside the id; a summary row."""
    read = read_table(
        lines(["zone", "name", *HOURS], (12, "B", 1, 2, 3, 4), (4, "A", 5, 6, "", 8), ("Total", "", 6, 8, 3, 12))
    )
    assert read.ids == [12, 4] and read.stamps == HOURS
    assert read.values == {"value": [[1, 5], [2, 6], [3, None], [4, 8]]}


def test_spans_of_time(read_table):
    """ENTSO-E: `from - to`, n/e."""
    rows = [
        f'"01.01.2019 0{h}:00 - 01.01.2019 0{h + 1}:00","{40000 + h}","{"n/e" if h == 1 else 41000 + h}"'
        for h in range(3)
    ]
    read = read_table(lines('"Time (CET)","Forecast [MW]","Actual, total [MW]"', *rows))
    assert read.stamps == HOURS[:3] and read.ids == ["Forecast [MW]", "Actual, total [MW]"]
    assert read.values["value"] == [[40000, 41000], [40001, None], [40002, 41002]]


def test_atomic_files(read_table):
    """LibCity's .dyna: a row number, a type, stamps in UTC."""
    rows = [f"{p * 2 + i},state,2012-03-01T0{8 + i}:00:00Z,{773 + p},{60 + i + p}" for p in range(2) for i in range(2)]
    read = read_table(lines("dyna_id,type,time,entity_id,traffic_speed", *rows), utc_offset=-480)
    assert read.ids == [773, 774] and read.stamps == ["2012-03-01 00:00", "2012-03-01 01:00"]
    assert read.values == {"traffic_speed": [[60, 61], [61, 62]]}


def test_cells_by_row_and_column(read_table):
    """LibCity's .grid: the cells make a grid, whose corner keeps the data's own rows and columns."""
    rows = [(f"2012-03-01T0{h}:00:00Z", r, c, 10 * r + c + h, h) for h in (0, 1) for r in (5, 6) for c in (2, 4)]
    read = read_table(lines("time,row_id,column_id,inflow,outflow", *rows))
    spec = read.plan.spec
    assert spec.shape == (2, 3) and spec.rows.tolist() == [5, 6] and spec.cols.tolist() == [2, 3, 4]
    assert read.values["inflow"] == [[52, None, 54, 62, None, 64], [53, None, 55, 63, None, 65]]
    assert read_table(lines("time,row_id,column_id,inflow,outflow", *rows), nodes=True).ids == [
        "5,2",
        "5,4",
        "6,2",
        "6,4",
    ]


@pytest.mark.parametrize("name", ["start_station_id", "detid_15", "Identifiant arc", "MSID", "stationId"])
def test_columns_called_after_places(read_table, name):
    """Beside names of the places, which stand in another column."""
    rows = [(place, f"Name {place}", stamp, i + place) for i, stamp in enumerate(HOURS) for place in (72, 79)]
    read = read_table(lines(f"{name},label,time,trips", *rows))
    assert read.ids == [72, 79] and read.values == {"trips": [[i + 72, i + 79] for i in range(4)]}


def test_hours_that_count_to_24_and_midnights_of_excel(read_table):
    read = read_table(lines("OPR_DATE,OPR_HR,MW", *[("2019-01-01", hour, hour) for hour in (1, 2, 23, 24)]))
    assert read.stamps == ["2019-01-01 01:00", "2019-01-01 02:00", "2019-01-01 23:00", "2019-01-02 00:00"]
    read = read_table("Date;a;b\n01.01.2019;1;2\n01.01.2019 12:00;3;4\n02.01.2019;5;6\n")
    assert read.stamps == ["2019-01-01 00:00", "2019-01-01 12:00", "2019-01-02 00:00"]


def test_numbers_between_blanks(read_table):
    """numpy.savetxt."""
    read = read_table({"a.txt": "1.5 2 3\n4 5 6.25\n"}, start="2019-01-01", cadence=60)
    assert read.values == {"value": [[1.5, 2, 3], [4, 5, 6.25]]}


def test_countries_are_added(read_table):
    """Telecom Italia's re-release: a row a square, hour and country."""
    rows = [
        (f"2013-11-01 0{h}:00:00", c, k, 0.5 if k else "", h + c + k) for h in (0, 1) for c in (1, 2) for k in (0, 39)
    ]
    text = lines("datetime,CellID,countrycode,smsin,internet", *rows)
    read = read_table(text, values="smsin,internet", duplicates="sum")
    assert read.values == {"smsin": [[0.5, 0.5]] * 2, "internet": [[41, 43], [43, 45]]}
    read = read_table(text, values="smsin,internet", duplicates="mean")
    assert read.values["internet"] == [[20.5, 21.5], [21.5, 22.5]]


def test_the_challenges_own_rows_without_a_header(read_table):
    text = "1\t1383260400000\t0\t0.08\t11.0\n1\t1383260400000\t39\t0.14\t12.0\n2\t1383260400000\t39\t0.14\t3.0\n"
    text += "1\t1383261000000\t39\t0.14\t12.0\n"
    read = read_table(text, place="column_1", values="column_5", channel="internet", duplicates="sum", utc_offset=60)
    assert read.ids == [1, 2] and read.stamps == ["2013-11-01 00:00", "2013-11-01 00:10"]
    assert read.values == {"internet": [[23, 3], [12, None]]}


def test_packed_tables(read_table):
    text = lines("time,a,b", *[(stamp, i, 5) for i, stamp in enumerate(HOURS)])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("set/a.csv", lines("time,a", *[(stamp, i) for i, stamp in enumerate(HOURS)]))
        file.writestr("__MACOSX/._a.csv", b"\x00")
        file.writestr("set/b.csv", lines("time,b", *[(stamp, 5) for stamp in HOURS]))
    for name, content in (("city.csv.gz", gzip.compress(text.encode())), ("city.zip", archive.getvalue())):
        read = read_table({name: content})
        assert read.ids == ["a", "b"] and read.values == {"value": [[i, 5] for i in range(4)]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_encodings_and_line_ends(read_table, encoding):
    text = "time,Caf\u00e9,b\r\n2019-01-01 00:00,1,2\r\n2019-01-01 01:00,3,4\r\n"
    read = read_table(text.encode(encoding))
    assert read.ids == ["Caf\u00e9", "b"] and read.values == {"value": [[1, 2], [3, 4]]}


def test_ids_beyond_int64(read_table):
    rows = [(place, stamp, i) for place in (2**63, 2**64) for i, stamp in enumerate(HOURS)]
    assert read_table(lines("id,time,v", *rows)).ids == [str(2**63), str(2**64)]
    head = f"{2**63},{2**63 + 1}"
    assert read_table(lines(head, "0.5,1.5", "2.5,3.5"), start="2019-01-01", cadence=60).ids == [
        str(2**63),
        str(2**63 + 1),
    ]


TSF = """# made by hand
@relation pedestrians
@attribute series_name string
@attribute start_timestamp date
@frequency half_hourly
@missing true
@equallength false
@data
T1:2011-12-31 13-00-00:1,2,?,4
T2:2011-12-31 14-00-00:5.5,6
"""


def test_monash(read_table):
    read = read_table({"pedestrians.tsf": TSF})
    assert read.ids == ["T1", "T2"] and read.stamps[0] == "2011-12-31 13:00"
    assert read.values == {"value": [[1, None], [2, None], [None, 5.5], [4, 6]]}
    bare = TSF.replace("@attribute start_timestamp date\n", "").replace(":2011-12-31 13-00-00", "")
    bare = bare.replace(":2011-12-31 14-00-00", "")
    read = read_table({"bare.tsf": bare}, start="2019-01-01", cadence=30)
    assert read.values == {"value": [[1, 5.5], [2, 6], [None, None], [4, None]]}


@pytest.mark.parametrize(
    ("old", "new", "options", "line"),
    [
        ("half_hourly", "weekly", {}, "is weekly; stores take steps of whole minutes"),
        ("14-00-00", "14-10-00", {}, "series 'T2' starts at 2011-12-31T14:10:00, between"),
        ("T2", "T1", {}, "series 'T1' occurs twice"),
        ("5.5", "five", {}, "line 10: 'five' is not a number"),
        ("T2:", "", {}, "line 10: 1 attributes instead of 2"),
        ("x", "x", {"cadence": 60}, "@frequency says 30 minutes between values, not 60"),
        ("x", "x", {"start": "2019-01-01"}, "has stamps of its own"),
    ],
)
def test_monash_refuses(read_table, refused, old, new, options, line):
    with refused(line):
        read_table({"pedestrians.tsf": TSF.replace(old, new)}, **options)
