@echo off
rem Starts LowVRAM Tuner on Windows; the first start installs it. Everything else happens in lowvram_tuner\bootstrap.py.
setlocal DisableDelayedExpansion
chcp 65001 >nul
title LowVRAM Tuner
pushd "%~dp0" || goto failed

for %%v in (3.12 3.13 3.11 3.14 3.10) do (
    py -%%v -c "" >nul 2>nul && set "PYTHON=py -%%v" && goto found
)
python -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))" >nul 2>nul && set "PYTHON=python" && goto found
echo error: no Python from 3.10 to 3.14 found; install Python 3.12 from https://www.python.org/downloads/ and start again.
goto failed

:found
%PYTHON% -s -E -X utf8 -m lowvram_tuner.bootstrap %*
if errorlevel 1 goto failed
popd
exit /b 0

:failed
set "CODE=%errorlevel%"
if "%CODE%"=="0" set "CODE=1"
echo.
echo The lines above say what went wrong. This window stays open until you press a key.
pause >nul
exit /b %CODE%
