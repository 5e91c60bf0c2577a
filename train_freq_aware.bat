@echo off
rem Creates a Python environment (Python 3.10+) and trains a LoRA in it, as train_freq_aware.sh does.
rem   .\train_freq_aware.bat                     a demo on a toy model, minutes on a CPU
rem   .\train_freq_aware.bat --config my.toml    your own SD1.x or SD2.x
setlocal
set "script=%~dp0freq_loss_plugin\engine\environment.py"
if defined PYTHON ("%PYTHON%" "%script%" %* & exit /b)
where py >nul 2>nul && (py -3 "%script%" %* & exit /b)
python "%script%" %*
